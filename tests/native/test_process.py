"""die_with_parent: a child does not outlive the process that started it."""

import os
import signal
import time
from pathlib import Path

import pytest

from aegaeon import _native


def fork_orphan(parent_pid: int) -> int:
    """Have a child start one that wants to die with `parent_pid` (0: its parent); its pid."""
    readable, writable = os.pipe()
    middle = os.fork()
    if middle == 0:
        if os.fork() == 0:
            _native.die_with_parent(signal.SIGKILL, parent_pid)
            os.write(writable, b"%d" % os.getpid())
            signal.pause()
        signal.pause()
    os.close(writable)
    text = os.read(readable, 20)
    os.close(readable)
    os.kill(middle, signal.SIGKILL)
    os.waitpid(middle, 0)
    return int(text)


def test_a_child_ends_when_its_parent_is_killed():
    pid = fork_orphan(0)
    end = time.monotonic() + 10.0
    while Path(f"/proc/{pid}").exists():
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
        if state in "ZX":
            break
        assert time.monotonic() < end
        os.sched_yield()


def test_a_parent_that_is_gone_already_counts():
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whatever the runner of the tests does
        _native.die_with_parent(signal.SIGTERM, 1 if os.getppid() != 1 else 2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM


def test_a_signal_that_does_not_exist_is_an_error():
    with pytest.raises((OSError, RuntimeError)):
        _native.die_with_parent(9999)
