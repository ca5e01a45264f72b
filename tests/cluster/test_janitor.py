"""What removes a node's memory where all who shared it were killed."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from aegaeon.store.shares import share_memory
from tests.support.polling import eventually

OWNER = """
    import pathlib, sys, time
    from aegaeon.cluster.janitor import watch
    from aegaeon.store.shares import share_memory
    share = share_memory(sys.argv[1], lambda: b"")
    pathlib.Path(f"/dev/shm/aegaeon-{sys.argv[1]}.weights").write_bytes(b"weights")
    janitor = watch(sys.argv[1])
    print("up", flush=True)
    time.sleep(60)
"""


def test_memory_goes_with_the_last_owner_however_they_end():
    name = f"test-janitor-{time.monotonic_ns()}"
    mine = share_memory(name, lambda: b"")
    command = [sys.executable, "-c", textwrap.dedent(OWNER), name]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert owner.stdout.readline() == b"up\n"
        owner.kill()
        owner.wait(10)
        weights = Path(f"/dev/shm/aegaeon-{name}.weights")
        time.sleep(0.5)  # in which its janitor has looked, and seen that another lives
        assert weights.exists()
        # Nobody releases mine: as one that is killed in the seconds after.
        assert mine._lock is not None
        os.close(mine._lock)
        mine._lock = None
        eventually(lambda: not list(Path("/dev/shm").glob(f"aegaeon-{name}.*")))
    finally:
        owner.kill()
        owner.stdout.close()
        mine.release()
