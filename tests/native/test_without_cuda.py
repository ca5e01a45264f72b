"""The package where no CUDA toolkit is: it compiles, imports, and says what cuda:0 needs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.sanitized import ROOT

# As a build without CUDA leaves _native: what it lacks, and what it says when asked for a device.
WITHOUT = """
import pkgutil, importlib
import aegaeon
from aegaeon import _native
from aegaeon.config import Settings
from aegaeon.errors import DeviceError
if not FROM_SOURCE:
    for name in [one for one in dir(_native) if one.startswith(("Cuda", "cuda_"))]:
        delattr(_native, name)
    def refuse(*_):
        raise DeviceError("this build has no CUDA")
    _native.CudaDevice = _native.count_cuda_devices = refuse
    _native.CudaMemory = _native.CudaPeer = None
for module in pkgutil.walk_packages(aegaeon.__path__, "aegaeon."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from aegaeon.engine.open import open_engine
try:
    open_engine(Settings(device="cuda:0"), (), None)
except DeviceError as error:
    print(error)
"""


def test_everything_imports_and_a_device_is_refused():
    assert "this build has no CUDA" in run_python(WITHOUT.replace("FROM_SOURCE", "False"))


@pytest.mark.thorough
def test_the_bindings_compile(tmp_path):
    configure(tmp_path)
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    (bindings,) = (one["command"] for one in commands if "unity_bind" in one["file"])
    checked = f"{bindings} -fsyntax-only"
    ran = subprocess.run(
        checked, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stderr[-4000:]


@pytest.mark.thorough
def test_the_whole_of_it_is_built_and_says_what_a_device_needs(tmp_path):
    built = tmp_path / "build"
    configure(built)
    subprocess.run(["cmake", "--build", str(built), "--target", "_native"], check=True)
    package = tmp_path / "package" / "aegaeon"
    package.mkdir(parents=True)
    for one in (ROOT / "aegaeon").iterdir():
        if not one.name.startswith(("_native.cpython", "__pycache__")):
            (package / one.name).symlink_to(one)
    (native,) = built.glob("_native*.so")
    shutil.copy(native, package)
    said = run_python(WITHOUT.replace("FROM_SOURCE", "True"), package.parent)
    assert "install the CUDA toolkit (nvcc)" in said and "--device cpu" in said


def configure(built: Path) -> None:
    """Have CMake say in `built` how the extension is compiled without CUDA, and quickly."""
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("cmake and ninja are needed: pip install cmake ninja, or the system's")
    (kept,) = sorted((ROOT / "build").glob("pybind11-*/share/cmake/pybind11"))[-1:] or [None]
    if kept is None:
        pytest.skip("pybind11 is kept where `make install` has built")
    command = ["cmake", "-S", str(ROOT), "-B", str(built), "-G", "Ninja"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={kept}"]
    command += ["-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O0", "-DAEGAEON_CUDA=0"]
    subprocess.run(command, check=True, capture_output=True)


def run_python(source: str, home: Path = ROOT) -> str:
    """Return what `source` prints, with the package of `home`."""
    ran = subprocess.run(
        [sys.executable, "-c", source],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(home)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return ran.stdout
