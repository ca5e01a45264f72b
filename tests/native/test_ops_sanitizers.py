"""Operators and their thread pool under the sanitizers, on every instruction set that is here."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.native.test_sanitizers import compiler

ROOT = Path(__file__).parent.parent.parent
CSRC = ROOT / "csrc"
SOURCES = [
    *sorted((CSRC / "ops" / "cpu").glob("*.cpp")),
    CSRC / "shm" / "futex.cpp",
    CSRC / "testing" / "ops_stress.cpp",
]
HEADERS = [*(CSRC / "ops").rglob("*.h"), CSRC / "shm" / "futex.h"]
# As in CMakeLists.txt.
FLAGS = {
    "kernels_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "kernels_avx512.cpp": [
        *("-mavx512f", "-mfma", "-Wno-maybe-uninitialized", "-Wno-uninitialized"),
    ],
}


def run_compiler(sanitizer: str, *arguments: str) -> None:
    command = [compiler(), "-g", "-pthread", f"-fsanitize={sanitizer}", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot find" in result.stderr and "san" in result.stderr:
        pytest.skip(f"this compiler has no runtime of the {sanitizer} sanitizer")
    assert result.returncode == 0, result.stderr


def build(sanitizer: str) -> Path:
    """Compile the program; kept in build/ until a source changes."""
    program = ROOT / "build" / "sanitizers" / f"ops_stress-{sanitizer.replace(',', '-')}"
    newest = max(source.stat().st_mtime for source in [*SOURCES, *HEADERS])
    if program.exists() and program.stat().st_mtime > newest:
        return program
    fresh = program.with_suffix(f".{os.getpid()}")
    fresh.mkdir(parents=True)
    objects = []
    for source in SOURCES:
        made = str(fresh / f"{source.name}.o")
        flags = FLAGS.get(source.name, []) if platform.machine() == "x86_64" else []
        run_compiler(
            sanitizer, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off",
            "-fno-sanitize-recover=all", *flags, f"-I{CSRC}", "-c", str(source), "-o", made,
        )  # fmt: skip
        objects.append(made)
    run_compiler(sanitizer, *objects, "-o", str(fresh / "program"))
    (fresh / "program").replace(program)
    shutil.rmtree(fresh)
    return program


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_the_sanitizers_find_nothing_in_the_operators(sanitizer):
    command = [str(build(sanitizer))]
    if setarch := shutil.which("setarch"):
        # Thread sanitizers of older compilers cannot place themselves among randomised addresses.
        command = [setarch, platform.machine(), "-R", *command]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "ops_stress: ok\n"
