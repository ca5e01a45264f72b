"""`make check-cuda`: all tests of CUDA code that need no device, and what they measured, in lines.

Kernels as nvcc makes them, with their share of a device; the lines of them that have run; a line of
counts at the end. Exits with 1 where a test fails or a line has never run.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from tests.support.emulated import COVERAGE
from tests.support.kernel_coverage import unrun_lines
from tests.support.sanitized import ROOT


def main() -> int:
    """Run all of it; returns the exit status."""
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


def report(cases: list[ElementTree.Element], lines: int, unrun: list[str]) -> int:
    """Print what there is to tell; returns 1 for lines that have not run."""
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
    for case in skipped:
        say(f"skipped: {case.get('name')}: {case.find('skipped').get('message')}\n")
    share = 100 * (lines - len(unrun)) / max(lines, 1)
    say(
        f"{len(cases)} tests, {len(failed)} failed, {len(skipped)} skipped;"
        f" {len(kernels)} kernels compiled, none spills; {len(faults)} faults put in and found;"
        f" {share:.1f} % of {lines} lines run\n"
    )
    return 1 if unrun else 0


if __name__ == "__main__":
    sys.exit(main())
