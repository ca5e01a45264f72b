"""Native code under the thread and address sanitizers, in programs without Python."""

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# The directories of csrc/ that each program of csrc/testing/ is made of.
PROGRAMS = {
    "shm_stress": ("shm",),
    "copy_schedule": ("copy", "shm"),
    "copy_stress": ("copy", "shm"),
    "kv_stress": ("memory", "shm"),
    "cache_stress": ("memory", "shm"),
}


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "c++"))
    if found is None:
        pytest.skip("no C++ compiler here (the package was built elsewhere)")
    return found


def build(name: str, sanitizer: str) -> Path:
    """Compile the program; kept in build/ until a source changes."""
    program = ROOT / "build" / "sanitizers" / f"{name}-{sanitizer.replace(',', '-')}"
    parts = [ROOT / "csrc" / part for part in PROGRAMS[name]]
    sources = [ROOT / "csrc" / "testing" / f"{name}.cpp"]
    sources += [source for part in parts for source in sorted(part.glob("*.cpp"))]
    headers = [header for part in parts for header in part.glob("*.h")]
    newest = max(source.stat().st_mtime for source in [*sources, *headers])
    if program.exists() and program.stat().st_mtime > newest:
        return program
    program.parent.mkdir(parents=True, exist_ok=True)
    fresh = program.with_suffix(f".{os.getpid()}")
    command = [
        compiler(), "-std=c++17", "-O1", "-g", "-pthread", "-Wall", "-Wextra", "-Werror",
        f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}",
        *map(str, sources), "-o", str(fresh),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot find" in result.stderr and "san" in result.stderr:
        pytest.skip(f"this compiler has no runtime of the {sanitizer} sanitizer")
    assert result.returncode == 0, result.stderr
    fresh.replace(program)
    return program


@pytest.fixture
def shm_directory() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="aegaeon-test-", dir="/dev/shm") as directory:
        yield directory


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_the_sanitizers_find_nothing(name, sanitizer, shm_directory):
    command = [str(build(name, sanitizer)), shm_directory]
    if setarch := shutil.which("setarch"):
        # Thread sanitizers of older compilers cannot place themselves among randomised addresses.
        command = [setarch, platform.machine(), "-R", *command]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{name}: ok\n"
