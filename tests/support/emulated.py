"""CUDA kernels on the emulation of csrc/testing: built by the plain compiler, called by ctypes."""

import ctypes
import functools
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from tests.support import kernel_coverage
from tests.support.sanitized import CSRC, ROOT, alone_at, compile_all, compiler, is_newer

# Sums and products are fused where the code says so, as nvcc is told.
FLAGS = ["-std=c++17", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-Wno-unknown-pragmas", f"-I{CSRC}"]
HOME = ROOT / "build" / "emulated"
# Names a directory: there the library is built to count which lines run.
COVERAGE = "KERNEL_COVERAGE"  # not AEGAEON_: servers refuse such that are no settings
KERNELS = sorted((CSRC / "ops" / "cuda").glob("*.cu"))
CALLED = [CSRC / "testing" / name for name in ("cuda_kernels.cpp", "cuda_misuse.cpp")]
EMULATION = sorted((CSRC / "testing" / "emulation").glob("*.cpp"))


def run(command: Sequence[str]) -> None:
    """Run a compiler; what it says is the failure."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]


def compile_object(source: Path, home: Path, *flags: str) -> Path:
    """Compile into `home` unless nothing that it includes has changed; return the object."""
    made = home / f"{source.name}.o"
    with alone_at(made):
        if not is_newer(made, [source, *CSRC.rglob("*.h"), Path(__file__)]):
            fresh = made.with_name(f"{made.name}.{os.getpid()}")
            language = ["-x", "c++"] if source.suffix == ".cu" else []
            # The emulation is compiled once and runs most of the time.
            level = "-O2" if source in EMULATION else "-O1"
            run([compiler(), level, *flags, *FLAGS, *language, "-c", str(source), "-o", str(fresh)])
            fresh.replace(made)
    return made


@functools.cache
def library() -> ctypes.CDLL:
    """Build what is needed and load it. Skips the test where there is no compiler."""
    coverage = os.environ.get(COVERAGE)
    home, flags = (Path(coverage), kernel_coverage.FLAGS) if coverage else (HOME, ())
    loaded = ctypes.CDLL(str(_make_library(home, flags)))
    loaded.last_error.restype = loaded.misuse.restype = ctypes.c_char_p
    loaded.shared_bytes.restype = loaded.attend_shared_bytes.restype = ctypes.c_int64
    return loaded


def _make_library(home: Path, flags: Sequence[str]) -> Path:
    # Steps, which are plain C++ around kernels, run on the stand-in for the runtime.
    sources = [*KERNELS, CSRC / "ops" / "cuda" / "tables.cpp", *EMULATION, *CALLED]
    objects = compile_all(functools.partial(compile_object, one, home, *flags) for one in sources)
    made = home / "cuda_kernels.so"
    with alone_at(made):
        if not is_newer(made, objects):
            fresh = made.with_name(f"{made.name}.{os.getpid()}")
            run([compiler(), "-shared", *flags, *map(str, objects), "-o", str(fresh)])
            fresh.replace(made)
    return made


def call(name: str, *arguments: Tensor | ctypes.Structure | float | None) -> None:
    """Call a function of csrc/testing/cuda_kernels.cpp; raises RuntimeError with what it throws.

    Tensors go as their addresses.
    """
    if getattr(library(), name)(*map(_converted, arguments)) != 0:
        raise RuntimeError(library().last_error().decode())


def _converted(argument: Tensor | ctypes.Structure | float | None) -> object:
    match argument:
        case Tensor():
            assert argument.is_contiguous()
            return ctypes.c_void_p(argument.data_ptr())
        case ctypes.Structure():
            return ctypes.byref(argument)
        case int():
            return ctypes.c_int64(argument)
        case float():
            return ctypes.c_float(argument)
        case _:
            return argument


def set_schedule(seed: int, is_copying_late: bool) -> None:
    """Choose the order of blocks and threads: 0 ascending, 1 descending, others random."""
    library().set_schedule(ctypes.c_uint64(seed), int(is_copying_late))
