"""Programs of csrc/testing/ under a sanitizer: each source compiled once, each program linked."""

import fcntl
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
SANITIZERS = ("thread", "address,undefined")
# Line tables are all that a report needs.
FLAGS = ["-std=c++17", "-O1", "-g1", "-pthread", "-Wall", "-Wextra", "-Werror"]
# Checks as calls: in line they are most of what the compiler is busy with.
CHECKS = {"address,undefined": ["--param", "asan-instrumentation-with-call-threshold=0"]}
# As in CMakeLists.txt.
OPS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
UNDEFINED = ("-Wno-maybe-uninitialized", "-Wno-uninitialized")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mfma", *UNDEFINED]
ISA = {
    "attention_avx2.cpp": AVX2,
    "attention_avx512.cpp": AVX512,
    "kernels_avx2.cpp": AVX2,
    "kernels_avx512.cpp": AVX512,
    "kernels_avx512bf16.cpp": ["-mavx512bw", "-mavx512bf16", "-mfma", *UNDEFINED],
    "kernels_avx512bw.cpp": ["-mavx512bw", "-mfma", *UNDEFINED],
    "kernels_avx512vnni.cpp": ["-mavx512bw", "-mavx512vnni", "-mfma", *UNDEFINED],
}


def run_sanitized(
    name: str, sources: list[Path], sanitizer: str, *arguments: str, flags: Sequence[str] = ()
) -> None:
    """Build the program `name` of csrc/testing/ with `sources`, run it, see that all is well."""
    sources = [*sources, CSRC / "testing" / f"{name}.cpp"]
    jobs = [partial(compile_one, source, sanitizer, flags) for source in sources]
    program = link(name, compile_all(jobs), sanitizer)
    result = run(program, *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{name}: ok\n"


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `program` to its end, a minute at most."""
    command = [str(program), *arguments]
    if setarch := shutil.which("setarch"):
        # Thread sanitizers of older compilers cannot place themselves among randomised addresses.
        command = [setarch, platform.machine(), "-R", *command]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def link(
    name: str, objects: list[Path], sanitizer: str, kept: Path | None = None, *flags: str
) -> Path:
    """Link the program; kept in build/, as its objects are, until a source or header changes."""
    program = (kept or _kept(sanitizer)) / name
    with alone_at(program):
        if not is_newer(program, objects):
            _make(program, sanitizer, *flags, *map(str, objects))
    return program


def compile_one(
    source: Path, sanitizer: str, flags: Sequence[str] = (), kept: Path | None = None
) -> Path:
    """Compile a source of csrc/, or one of elsewhere that includes what is there."""
    home = CSRC if CSRC in source.parents else source.parent
    made = (kept or _kept(sanitizer)) / f"{source.relative_to(home)}.o"
    flags = [*flags, *(OPS if "ops" in source.parts else [])]
    if platform.machine() == "x86_64":
        flags = [*flags, *ISA.get(source.name, [])]
    flags = [*FLAGS, *CHECKS.get(sanitizer, []), *flags]
    with alone_at(made):
        if not is_newer(made, [source, *CSRC.rglob("*.h"), Path(__file__)]):
            _make(made, sanitizer, *flags, f"-I{CSRC}", "-c", str(source))
    return made


def compile_all(jobs: Iterable[Callable[[], Path]]) -> list[Path]:
    """Return what each of `jobs` makes; the compilers are other processes, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return [done.result() for done in [pool.submit(job) for job in jobs]]


@contextmanager
def alone_at(made: Path) -> Iterator[None]:
    """Have whoever tests beside us wait, who then finds `made`: nothing is compiled twice."""
    made.parent.mkdir(parents=True, exist_ok=True)
    with made.with_name(f"{made.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _kept(sanitizer: str) -> Path:
    return ROOT / "build" / "sanitizers" / (sanitizer.replace(",", "-") or "none")


def is_newer(made: Path, sources: list[Path]) -> bool:
    """Return whether `made` is there and younger than all of `sources`."""
    newest = max(source.stat().st_mtime for source in sources)
    return made.exists() and made.stat().st_mtime > newest


def _make(made: Path, sanitizer: str, *arguments: str) -> None:
    """Run the compiler and put what it makes in place at once, for others may look."""
    fresh = made.with_name(f"{made.name}.{os.getpid()}")
    command = [compiler(), "-pthread", *arguments, "-o", str(fresh)]
    if sanitizer:
        command += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot find" in result.stderr and "san" in result.stderr:
        pytest.skip(f"this compiler has no runtime of the {sanitizer} sanitizer")
    assert result.returncode == 0, result.stderr
    fresh.replace(made)


def compiler() -> str:
    """Return the C++ compiler, or skip."""
    found = shutil.which(os.environ.get("CXX", "c++"))
    if found is None:
        pytest.skip("no C++ compiler here (the package was built elsewhere)")
    return found
