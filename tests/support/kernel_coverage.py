"""Which lines of the CUDA kernels have run on the emulation, by gcov."""

import gzip
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support.sanitized import CSRC

# What the runs are compiled with: lines as they are written.
FLAGS = ("--coverage", "-g1", "-fno-inline")
PLACE = CSRC / "ops" / "cuda"


def unrun_lines(home: Path) -> tuple[int, list[str]]:
    """Return how many lines the sources in csrc/ops/cuda have, and `file:line` of those that no
    process has run that was built in `home` and has ended."""
    counts: dict[tuple[Path, int], int] = {}
    for path, number, count in _lines(home):
        counts[path, number] = max(count, counts.get((path, number), 0))
    unrun = [f"{path.name}:{number}" for (path, number), count in counts.items() if count == 0]
    return len(counts), sorted(unrun)


def _lines(home: Path) -> Iterator[tuple[Path, int, int]]:
    gcov = shutil.which("gcov")
    assert gcov is not None, "coverage needs gcov, which comes with the compiler"
    for notes in sorted(home.glob("*.gcda")):
        command = [gcov, "--json-format", "--stdout", str(notes)]
        result = subprocess.run(command, capture_output=True, cwd=home, check=True)
        text = result.stdout
        if text[:2] == b"\x1f\x8b":
            text = gzip.decompress(text)
        for report in text.decode().splitlines():
            for file in json.loads(report)["files"]:
                path = Path(file["file"]).resolve()
                if path.parent != PLACE:
                    continue
                for line in file["lines"]:
                    yield path, line["line_number"], line["count"]
