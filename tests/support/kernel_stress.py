"""Programs that run CUDA kernels under a sanitizer, as they are or with something wrong in them."""

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.support.emulated import EMULATION, compile_object, run
from tests.support.sanitized import CSRC, ROOT, compile_all, compiler

THREAD = "thread"
# Of what is undefined, that which kernels could well do: a device stops at what is not aligned.
ADDRESS = "address,alignment,bounds,shift,signed-integer-overflow"
# What the emulation is told of them.
MARKS = {THREAD: "-DAEGAEON_FIBERS_THREAD", ADDRESS: "-DAEGAEON_FIBERS_ADDRESS"}
# Sources of csrc/ops/cuda that each program of csrc/testing/ is made of.
PROGRAMS = {
    "cuda_attend_stress": ("tables.cpp",),
    "cuda_rows_stress": ("tables.cpp", "norm.cu", "rotate.cu", "blocks.cu", "sampling.cu"),
}


@dataclass(frozen=True)
class Mutant:
    """A source of csrc/ops/cuda of which the one `before` becomes `after`."""

    source: str
    before: str
    after: str


def run_stress(
    program: str, sanitizer: str, mutant: Mutant | None = None, home: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Build the program, a mutant in `home`, and run it to its end. Fails where it is not built."""
    made = _build(program, sanitizer, mutant, home or _kept(sanitizer))
    command = [str(made)]
    if setarch := shutil.which("setarch"):
        # Thread sanitizers of older compilers cannot place themselves among randomised addresses.
        command = [setarch, platform.machine(), "-R", *command]
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1:exitcode=66"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=environment
    )


def _build(program: str, sanitizer: str, mutant: Mutant | None, home: Path) -> Path:
    flags = ["-g1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    sources = [CSRC / "testing" / f"{program}.cpp"]
    sources += [CSRC / "ops" / "cuda" / name for name in PROGRAMS[program]]
    changed: set[Path] = set()
    if mutant is not None:
        path = _write(mutant, home)
        flags = [f"-I{home}", *flags]
        # A header is in one of them; a source is compiled in its place.
        changed = {source for source in sources if _includes(source, mutant.source)}
        sources = [path if source.name == mutant.source else source for source in sources]
        changed.add(path)
    _skip_without(sanitizer)
    kept, mark = _kept(sanitizer), MARKS[sanitizer]
    jobs = [partial(compile_object, source, kept, mark) for source in EMULATION]
    for source in sources:
        jobs.append(partial(compile_object, source, home if source in changed else kept, *flags))
    made = compile_all(jobs)
    result = home / program
    fresh = result.with_name(f"{result.name}.{os.getpid()}")
    run([compiler(), f"-fsanitize={sanitizer}", *map(str, made), "-o", str(fresh)])
    return fresh.replace(result)


def _kept(sanitizer: str) -> Path:
    return ROOT / "build" / "emulated" / sanitizer.partition(",")[0]


def _write(mutant: Mutant, home: Path) -> Path:
    """Write the mutant where it is included before the original; it must differ in one place."""
    text = (CSRC / "ops" / "cuda" / mutant.source).read_text(encoding="utf-8")
    assert text.count(mutant.before) == 1, f"{mutant} no longer fits"
    path = home / "ops" / "cuda" / mutant.source
    path.parent.mkdir(parents=True)
    path.write_text(text.replace(mutant.before, mutant.after), encoding="utf-8")
    return path


def _includes(source: Path, name: str) -> bool:
    """Return whether `source` includes csrc/ops/cuda/`name`, by itself or by others."""
    text = source.read_text(encoding="utf-8")
    if f'"ops/cuda/{name}"' in text:
        return True
    headers = re.findall(r'^#include "(ops/.*)"', text, re.MULTILINE)
    return any(_includes(CSRC / header, name) for header in headers)


def _skip_without(sanitizer: str) -> None:
    command = [compiler(), f"-fsanitize={sanitizer}", "-x", "c++", "-", "-o", os.devnull]
    result = subprocess.run(command, input=b"int main() {}", capture_output=True, check=False)
    if result.returncode != 0:
        pytest.skip(f"this compiler has no runtime of the {sanitizer} sanitizer")
