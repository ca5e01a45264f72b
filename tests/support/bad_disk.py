"""A disk that fails on request, under processes started with an environment of its own."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "csrc/testing/bad_disk.cpp"


class BadDisk:
    """What processes read with pread, while `fails` says so; see csrc/testing/bad_disk.cpp."""

    def __init__(self, directory: Path) -> None:
        """Compile what is preloaded; skips the test where that cannot be done."""
        compiler = shutil.which(os.environ.get("CXX", "c++"))
        if compiler is None:
            pytest.skip("no C++ compiler here to build a bad disk with")
        library = directory / "bad_disk.so"
        build = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-o", str(library)]
        subprocess.run([*build, str(SOURCE), "-ldl"], check=True, timeout=120)
        self._rule = directory / "bad_disk.rule"
        self.environment = {"LD_PRELOAD": str(library), "BAD_DISK": str(self._rule)}

    def fails(self, fault: str, fragment: str, first: int = 0) -> None:
        """From read number `first` on of files with `fragment` in their path: eio, eof, short or
        hang."""
        # In one step: a reader sees the old rule or the new one.
        fresh = self._rule.with_suffix(".new")
        fresh.write_text(f"{fault} {first} {fragment}\n")
        fresh.replace(self._rule)

    def recovers(self) -> None:
        """Every read works again, those that hang as well."""
        self._rule.unlink(missing_ok=True)
