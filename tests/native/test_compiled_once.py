"""Sanitized objects are compiled once for all tests, however many want one at the same time."""

from functools import partial

import pytest

from tests.support.sanitized import CSRC, compile_all, compile_one

# Slower than whoever looks whether it is there.
COMPILER = """#!/bin/sh
echo compiled >> {home}/calls
while [ "$1" != -o ]; do shift; done
sleep 0.2
echo object > "$2"
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    compiler = tmp_path / "c++"
    compiler.write_text(COMPILER.format(home=tmp_path))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    return tmp_path / "calls"


def test_who_comes_second_waits_and_finds_it_made(calls, tmp_path):
    kept = tmp_path / "kept"
    job = partial(compile_one, CSRC / "shm" / "futex.cpp", "thread", (), kept)
    first, second = compile_all([job, job])
    assert first == second == kept / "shm" / "futex.cpp.o"
    assert first.read_text() == "object\n"
    assert calls.read_text() == "compiled\n"
    assert sorted(path.name for path in first.parent.iterdir()) == [
        "futex.cpp.o", "futex.cpp.o.lock"
    ]  # fmt: skip


def test_a_source_that_does_not_compile_is_told_and_tried_again(calls, tmp_path, monkeypatch):
    job = partial(
        compile_one, CSRC / "shm" / "futex.cpp", "", ("-no-such-flag",), tmp_path / "kept"
    )
    monkeypatch.delenv("CXX")
    with pytest.raises(AssertionError, match="no-such-flag"):
        compile_all([job])
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    assert compile_all([job])[0].read_text() == "object\n"
