"""CUDA kernels as nvcc makes them: what each takes of a device, by the assembler's own report."""

import ctypes
import functools
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.support.cuda_toolkit import the_toolkit
from tests.support.emulated import KERNELS, run
from tests.support.sanitized import CSRC, ROOT, compiler, is_newer

CAPABILITIES = (80, 90)
# As cmake/cuda.cmake has it, but for the report. Any spill, any local memory and any warning is an
# error; newer devices compile the PTX that is made beside.
FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Werror", "all-warnings"]
FLAGS += ["-Xptxas", "-v,-warn-spills,-warn-lmem-usage,-Werror", f"-I{CSRC}"]
TARGETS = ["-gencode", "arch=compute_80,code=sm_80"]
TARGETS += ["-gencode", "arch=compute_90,code=[sm_90,compute_90]"]


@dataclass(frozen=True, order=True)
class Compiled:
    """One kernel for one compute capability."""

    name: str  # with its template's arguments
    capability: int
    registers: int
    spilled_bytes: int
    stack_bytes: int


def compile_all() -> list[Compiled]:
    """Compile every kernel for all targets; skips where there is no toolkit, fails as nvcc does."""
    nvcc = the_toolkit() / "bin" / "nvcc"
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda source: _compile(str(nvcc), source), KERNELS))
    return sorted(kernel for report in reports for kernel in _kernels(report))


def blocks_at_once(kernel: Compiled, threads: int, shared_bytes: int) -> int:
    """Return how many blocks of the kernel a multiprocessor holds."""
    given = (kernel.capability, threads, kernel.registers, ctypes.c_size_t(shared_bytes))
    return int(_calculator().blocks_at_once(*given))


def _compile(nvcc: str, source: Path) -> str:
    """Return the report; kept until a source changes."""
    home = ROOT / "build" / "emulated" / "nvcc"
    report = home / f"{source.name}.txt"
    if not is_newer(report, [source, *CSRC.rglob("*.h"), Path(__file__)]):
        home.mkdir(parents=True, exist_ok=True)
        made = home / f"{source.name}.{os.getpid()}.o"
        command = [nvcc, *FLAGS, *TARGETS, "-c", str(source), "-o", str(made)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-4000:]
        made.unlink()
        report.write_text(result.stderr, encoding="utf-8")
    return report.read_text(encoding="utf-8")


def _kernels(report: str) -> list[Compiled]:
    found = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame,"
        r" (\d+) bytes spill stores.*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    names = subprocess.run(
        ["c++filt"],
        input="\n".join(name for name, *_ in found),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return [
        Compiled(_short(name), int(capability), int(registers), int(spilled), int(stack))
        for name, (_, capability, stack, spilled, registers) in zip(names, found, strict=True)
    ]


def _short(name: str) -> str:
    """Return a demangled name without its namespaces, result and parameters."""
    name = re.sub(r"\(anonymous namespace\)::|aegaeon::ops::(cuda::)?|\((int|bool)\)", "", name)
    return re.sub(r"^void |\(.*$", "", name)


@functools.cache
def _calculator() -> ctypes.CDLL:
    made = ROOT / "build" / "emulated" / "occupancy.so"
    source = CSRC / "testing" / "occupancy.cpp"
    if not is_newer(made, [source]):
        made.parent.mkdir(parents=True, exist_ok=True)
        fresh = made.with_name(f"{made.name}.{os.getpid()}")
        includes = ["-isystem", str(the_toolkit() / "include")]
        run([compiler(), "-O1", "-shared", "-fPIC", *includes, str(source), "-o", str(fresh)])
        fresh.replace(made)
    return ctypes.CDLL(str(made))
