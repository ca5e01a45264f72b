"""A cable as a process: two network devices, one of them in a namespace, and what is sent at one
end comes out at the other late, or not at all. As tc-netem(8), which many kernels lack."""

import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import sys
import time
from contextlib import suppress

from tests.support.server import ROOT

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
CLONE_NEWNET = 0x40000000
FRAME_BYTES = 1 << 16


class SlowWire:
    """From here to `namespace`, until `close`; `devices` are what its ends are called. Each frame
    takes `delay_s`, and of all of them the share `loss` is lost."""

    def __init__(
        self, namespace: str, devices: tuple[str, str], delay_s: float, loss: float
    ) -> None:
        told = [namespace, *devices, str(delay_s), str(loss)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *told],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
        )  # fmt: skip
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            _, why = self._process.communicate()
            raise OSError(why.decode(errors="replace").splitlines()[-1])

    def close(self) -> None:
        """Take it away, with its devices."""
        self._process.kill()
        self._process.communicate()


def open_device(name: str) -> int:
    """Make a device in the namespace where we are; returns its descriptor. Raises OSError."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TAP | IFF_NO_PI))
    return descriptor


def enter(namespace: str) -> None:
    """Go to a namespace. Raises OSError."""
    with open(f"/run/netns/{namespace}", "rb") as there:  # noqa: PTH123  a descriptor
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(there.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")


def carry(ends: tuple[int, int], delay_s: float, loss: float) -> None:
    """Carry frames between two devices until stdin ends."""
    dice, order = random.Random(1), 0
    under_way: list[tuple[float, int, int, bytes]] = []
    to = {ends[0]: ends[1], ends[1]: ends[0]}
    while True:
        wait_s = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        ready, _, _ = select.select([*ends, sys.stdin], [], [], wait_s)
        now = time.monotonic()
        if sys.stdin in ready:
            return
        for end in ready:
            frame = os.read(end, FRAME_BYTES)
            if dice.random() >= loss:
                order += 1
                heapq.heappush(under_way, (now + delay_s, order, to[end], frame))
        while under_way and under_way[0][0] <= now:
            _, _, end, frame = heapq.heappop(under_way)
            with suppress(OSError):  # a device that is down loses it
                os.write(end, frame)


def main(namespace: str, here: str, there: str, delay_s: str, loss: str) -> None:
    """Make the devices, say that they are there, and carry."""
    ours = open_device(here)
    enter(namespace)
    theirs = open_device(there)
    print("ready", flush=True)  # noqa: T201  whoever started us waits for it
    carry((ours, theirs), float(delay_s), float(loss))


if __name__ == "__main__":
    main(*sys.argv[1:])
