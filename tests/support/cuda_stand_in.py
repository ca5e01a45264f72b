"""A CUDA device that this host stands in for: its runtime, and its kernels one thread at a time."""

import functools
import gc
import importlib.util
import os
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from torch import Tensor

from aegaeon import _native
from aegaeon.config import Settings
from aegaeon.device.cpu import CpuDevice
from aegaeon.device.packed import Matrix
from aegaeon.engine.cuda import on_device
from aegaeon.engine.engine import ModelEngine
from aegaeon.engine.own_memory import open_on
from aegaeon.engine.regions import Regions
from aegaeon.engine.shared import Compute
from aegaeon.types import ModelSpec
from tests.support.cuda_products import host_view
from tests.support.cuda_toolkit import the_toolkit
from tests.support.emulated import EMULATION, KERNELS, compile_object
from tests.support.sanitized import CSRC, ROOT, compile_all, compile_one, link

EAGER, LAZY, RANDOM = 0, 1, 2
HOME = ROOT / "build" / "stand_in"


# Names another build of the module, with something wrong in it.
MUTANT = "AEGAEON_STAND_IN_MUTANT"


@functools.cache
def stand_in() -> ModuleType:
    """Import the module: the names that _native has of CUDA, and a test's own. Skips the test where
    there is no toolkit or compiler."""
    made = Path(os.environ.get(MUTANT) or build_stand_in())
    spec = importlib.util.spec_from_file_location("cuda_stand_in", made)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_stand_in(mutant: tuple[str, str, str] | None = None, home: Path | None = None) -> Path:
    """Build the module and return it; of a `mutant` (a source in csrc/, of which the one `before`
    becomes `after`) in `home`."""
    kept = sorted((ROOT / "build").glob("pybind11-*/include"))  # where setup.py keeps it
    if not kept:
        pytest.skip("no pybind11 in build/ (the package was built elsewhere)")
    includes = [str(the_toolkit() / "include"), str(kept[-1]), sysconfig.get_paths()["include"]]
    flags = [part for include in includes for part in ("-isystem", include)]
    flags += ["-fPIC", "-fvisibility=hidden", "-DAEGAEON_CUDA", "-O0", "-Wno-unknown-pragmas"]
    sources = [CSRC / "testing" / "cuda_module.cpp", CSRC / "bind" / "errors.cpp"]
    for part in ("copy", "cuda", "testing/cudart", "ops/cuda"):
        sources += sorted((CSRC / part).glob("*.cpp"))
    sources += [CSRC / "shm" / "futex.cpp", *sorted((CSRC / "ops").glob("*.cpp"))]
    if mutant is not None and home is not None:
        name, before, after = mutant
        text = (CSRC / name).read_text(encoding="utf-8")
        assert text.count(before) == 1, f"{name} has {text.count(before)} times {before!r}"
        mutated = home / Path(name).name
        mutated.write_text(text.replace(before, after), encoding="utf-8")
        sources[sources.index(CSRC / name)] = mutated
    homes = {source: HOME if CSRC in source.parents else home for source in sources}
    jobs = [partial(compile_one, source, "", flags, homes[source]) for source in sources]
    emulated = [*KERNELS, *EMULATION]
    jobs += [partial(compile_object, source, ROOT / "build" / "emulated") for source in emulated]
    return link("cuda_stand_in.so", compile_all(jobs), "", home or HOME, "-shared")


class CpuBeside(CpuDevice):
    """Computes as the CPU does on the memory of `device`, whose stream has to keep up."""

    def __init__(self, device, threads: int) -> None:
        super().__init__(threads)
        self._beside = device

    def check(self) -> None:
        self._beside.check()

    def embed(self, token_ids: Tensor, table: Matrix) -> Tensor:
        self._beside.synchronize()
        return super().embed(token_ids, table)


def open_beside(settings: Settings, specs: tuple[ModelSpec, ...], regions: Regions) -> ModelEngine:
    """Open an engine on the device's memory and copies, which computes on the CPU."""
    device = stand_in().CudaDevice(settings.cuda_number)
    compute = Compute(lambda _, budgets, __: CpuBeside(device, budgets.threads), pins=device)
    return open_on(on_device(device, host_view, compute), settings, specs, regions)


def put_in_place(module: ModuleType, patch: pytest.MonkeyPatch) -> None:
    """Have all that _native has of CUDA, or would have in a build with it, be the stand-in's."""
    for name in dir(module):
        is_ours = hasattr(_native, name) or name.lower().startswith("cuda")
        if is_ours and not name.startswith("_"):
            patch.setattr(_native, name, getattr(module, name), raising=False)


@contextmanager
def cuda_device(order: int, seed: int = 1) -> Iterator[ModuleType]:
    """Have the stand-in run what it is given in this order; all must have been given back at the
    end, and no copy was given memory that a device cannot reach."""
    module = stand_in()
    module.reset(order, seed)
    yield module
    gc.collect()
    found = module.left_over(), module.pageable_copies()
    assert found == (0, 0), found
