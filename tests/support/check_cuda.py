"""`make check-cuda`: all tests of CUDA code that need no device, and what they measured, in lines.

Kernels as nvcc makes them, with their share of a device; the lines of them that have run; a line of
counts at the end. Exits with 1 where a test fails, a line has never run, or what it takes to tell
is missing: `make test` skips such tests, here they are what was asked for.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from tests.support.cuda_toolkit import find_toolkit
from tests.support.emulated import COVERAGE
from tests.support.kernel_coverage import unrun_lines
from tests.support.sanitized import ROOT


def main() -> int:
    """Run all of it; returns the exit status."""
    absent = missing()
    if absent:
        sys.stdout.write("".join(f"missing: {what}\n" for what in absent))
        return 1
    with tempfile.TemporaryDirectory(prefix="check-cuda-") as directory:
        results, home = Path(directory) / "results.xml", Path(directory) / "coverage"
        home.mkdir()
        command = [sys.executable, "-m", "pytest", "-m", "", "tests/cuda"]
        # The family that has room for what tests tell.
        command += ["-o", "junit_family=xunit1", f"--junitxml={results}"]
        status = subprocess.run(
            command, cwd=ROOT, env={**os.environ, COVERAGE: str(home)}, check=False
        ).returncode
        if not results.exists():
            return status
        lines, unrun = unrun_lines(home)
        cases = list(ElementTree.parse(results).getroot().iter("testcase"))
    return report(cases, lines, unrun) or status


def missing() -> list[str]:
    """Return what is not here and is needed, each with what to do."""
    toolkit, absent = find_toolkit(), []
    if toolkit is None:
        absent.append(
            "the CUDA toolkit's headers; install it, or name its directory by CUDA_HOME (the PyPI "
            "wheels of nvidia-cuda-nvcc and nvidia-cuda-runtime do)"
        )
    elif not (toolkit / "bin" / "nvcc").exists():
        absent.append(f"nvcc in {toolkit / 'bin'}; install the toolkit's compiler too")
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        absent.append("a C++ compiler; install g++, or name one by CXX")
    if shutil.which("gcov") is None:
        absent.append("gcov, which tells which lines have run; it comes with g++")
    return absent


def report(cases: list[ElementTree.Element], lines: int, unrun: list[str]) -> int:
    """Print what there is to tell; returns 1 for lines that have not run, and where nothing was
    compiled or no fault was put in."""
    properties = [item.attrib for case in cases for item in case.iter("property")]
    kernels = [item["value"] for item in properties if item["name"] == "cuda kernel"]
    faults = [item["value"] for item in properties if item["name"] == "cuda fault"]
    failed = [case for case in cases if case.find("failure") is not None]
    failed += [case for case in cases if case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    say = sys.stdout.write
    for kernel in sorted(kernels):
        say(f"{kernel}\n")
    for line in unrun:
        say(f"never run: {line}\n")
    reasons = Counter(case.find("skipped").get("message") for case in skipped)
    for reason, count in sorted(reasons.items()):
        say(f"skipped: {count}: {reason}\n")
    share = 100 * (lines - len(unrun)) / max(lines, 1)
    say(
        f"{len(cases)} tests, {len(failed)} failed, {len(skipped)} skipped;"
        f" {len(kernels)} kernels compiled, none spills; {len(faults)} faults put in and found;"
        f" {share:.1f} % of {lines} lines run\n"
    )
    for what, found in (("kernel was compiled", kernels), ("fault was put in", faults)):
        if not found:
            say(f"no {what}: the tests above were skipped or failed, and this run tells nothing\n")
    return 1 if unrun or not lines or not kernels or not faults else 0


if __name__ == "__main__":
    sys.exit(main())
