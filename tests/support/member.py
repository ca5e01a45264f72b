"""A member of a cluster without Ray: a process that is told on its standard input, says how it is
on its output, a line each time that changes, and drains once there is nothing more to read."""

import os
import sys
import threading
import time

from aegaeon.cluster.member import Member


def main() -> None:
    """Be one until it has ended."""
    member = Member(sys.stdin.buffer.readline())
    threading.Thread(target=drain_at_end, args=(member,), daemon=True).start()
    last = b""
    while b'"ended"' not in last and b'"failed"' not in last:
        look = member.look()
        if look != last:
            last = look
            sys.stdout.buffer.write(look + b"\n")
            sys.stdout.buffer.flush()
        time.sleep(0.02)


def drain_at_end(member: Member) -> None:
    """Wait for the end of what is told."""
    while os.read(0, 1):
        pass
    member.drain()


if __name__ == "__main__":
    main()
