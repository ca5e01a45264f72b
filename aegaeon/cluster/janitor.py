"""Removes a node's shared memory when its last member has died without doing that itself, as all do
whose raylet ends: a process beside each member, which ends when its member has.

It imports nothing of ours before that, so as to take nothing meanwhile.
"""

import os
import subprocess
import sys
import time
from typing import IO

START_S = 30.0
PATIENCE_S = 10.0  # for others that die at the same time, and their children
PAUSE_S = 0.1


def watch(name: str) -> IO[bytes]:
    """Start a janitor of the memory called `name`; it acts when what is returned is closed, by us
    or by our end. Raises OSError."""
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, name], stdin=subprocess.PIPE, start_new_session=True
    )
    # It has become another one by then, which is not our child: Ray ends those of its workers.
    process.wait(START_S)
    assert process.stdin is not None
    return process.stdin


def main(name: str) -> int:
    """Wait for the end of stdin, then sweep."""
    if os.fork():
        return 0
    sys.stdin.buffer.read()
    from aegaeon.store.shares import sweep_share  # noqa: PLC0415  only now, see above

    give_up_s = time.monotonic() + PATIENCE_S
    while not sweep_share(name) and time.monotonic() < give_up_s:
        time.sleep(PAUSE_S)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
