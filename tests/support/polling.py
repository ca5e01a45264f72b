"""Waiting for what other threads and processes do, with a deadline instead of a guess."""

import time
from collections.abc import Callable


def eventually(claim: Callable[[], object], within_s: float = 10.0) -> None:
    """Return as soon as `claim()` is true; fail the test when it is not true in time."""
    deadline_s = time.monotonic() + within_s
    while not claim():
        assert time.monotonic() < deadline_s, "it did not become true in time"
        time.sleep(0.005)
