"""Builds aegaeon._native: CMake and Ninja from the build requirements, no torch headers.

Environment: AEGAEON_CUDA=auto|0|1 (CUDA sources), AEGAEON_SANITIZE=address|thread.
"""

import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).resolve().parent
CHOICES = {"AEGAEON_CUDA": ("auto", "0", "1"), "AEGAEON_SANITIZE": ("", "address", "thread")}


class CMakeExtension(Extension):
    """An extension whose sources CMake knows; setuptools only learns its name."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Configures and builds in build/native-*, which is kept, so that a rebuild is incremental."""

    def build_extension(self, ext: Extension) -> None:
        """Build `ext` and put it where setuptools wants it. Raises CompileError with a remedy."""
        choices = {name: _choice(name) for name in CHOICES}
        sanitize = choices["AEGAEON_SANITIZE"]
        tag = sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag
        # A directory per compiler: CMake keeps to the one that it has found first.
        compiler = re.sub(r"[^\w.+-]+", "_", os.environ.get("CXX", ""))
        build_dir = ROOT / "build" / "-".join(filter(None, ("native", tag, sanitize, compiler)))
        cmake = _tool("cmake", "CMAKE_BIN_DIR")
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={_tool('ninja', 'BIN_DIR')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={_kept_pybind11()}",
            "-DCMAKE_BUILD_TYPE=" + ("Debug" if self.debug else "Release"),
            *(f"-D{name}={value}" for name, value in choices.items()),
        ]  # fmt: skip
        _run(configure, "the native build could not be configured")
        build = [cmake, "--build", str(build_dir), "--target", "_native"]
        _run(build, "the native extension did not compile")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # A new inode: processes that run the old one keep it.
        target.unlink(missing_ok=True)
        shutil.copy2(build_dir / target.name, target)
        if not sanitize:
            _publish_compile_commands(build_dir)


def _choice(name: str) -> str:
    value = os.environ.get(name, CHOICES[name][0]).strip().lower()
    if value not in CHOICES[name]:
        known = ", ".join(repr(choice) for choice in CHOICES[name])
        raise SetupError(f"{name} must be one of {known}, not {value!r}")
    return value


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise SetupError(
            f"the native build needs {name}, which pip installs by itself; "
            f"with --no-build-isolation, run `pip install pybind11 cmake ninja` first"
        ) from None


def _kept_pybind11() -> Path:
    """Copy pybind11 into build/ once: pip's build environment is a new directory each time.

    With headers whose path and age stay, a second install recompiles only what has changed.
    """
    package = _module("pybind11")
    home, cmake_dir = Path(package.__file__).parent, Path(package.get_cmake_dir())
    if home not in cmake_dir.parents:
        return cmake_dir  # a distribution's, which stays where it is
    kept = ROOT / "build" / f"pybind11-{package.__version__}"
    if not kept.is_dir():
        fresh = kept.with_name(f"{kept.name}.new-{os.getpid()}")
        shutil.copytree(home, fresh)
        try:
            fresh.rename(kept)
        except OSError:  # another build was faster
            shutil.rmtree(fresh)
    return kept / cmake_dir.relative_to(home)


def _tool(name: str, directory_attribute: str) -> str:
    """Find the program in the build requirements, else on PATH (a distribution's own)."""
    try:
        found = Path(getattr(importlib.import_module(name), directory_attribute)) / name
        if found.is_file():
            return str(found)
    except (ImportError, AttributeError):
        pass
    on_path = shutil.which(name)
    return on_path if on_path else str(_module(name))


def _run(command: list[str], failure: str) -> None:
    try:
        subprocess.run(command, cwd=ROOT, check=True)
    except subprocess.CalledProcessError as error:
        raise CompileError(
            f"{failure} (the cause stands above; exit {error.returncode}); it needs a C++17 "
            f"compiler (Debian, Ubuntu: `apt install g++`, or name one by CXX) and the headers of "
            f"{sys.executable} (`apt install python3-dev` for a system Python). "
            f"If a compiler was changed, remove {ROOT / 'build'} first"
        ) from None


def _publish_compile_commands(build_dir: Path) -> None:
    """Editors and clang tools look for it in the root."""
    link = ROOT / "compile_commands.json"
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(build_dir / link.name, ROOT))


setup(ext_modules=[CMakeExtension("aegaeon._native")], cmdclass={"build_ext": CMakeBuild})
