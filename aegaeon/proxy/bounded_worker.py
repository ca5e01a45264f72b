"""What a bounded process does: `-m aegaeon.proxy.X FD SECONDS BYTES`, whose main calls `run`.

Work that a stranger wrote may loop or grow for ever. The kernel's limits on this process end it: no
check inside an interpreter, nor inside a library, stops everything.
"""

import resource
import signal
import socket
import sys
from collections.abc import Callable

from aegaeon.proxy.frames import receive_frame, send_frame

MAX_FRAME_BYTES = 1 << 30


def run(answer: Callable[[bytes], bytes]) -> int:
    """Bound ourselves, then answer each frame in turn until the other side closes."""
    descriptor, cpu_s, memory_bytes = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    # Ctrl-C at a terminal is for the server, which closes our socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=descriptor) as peer:
        while (frame := receive_frame(peer, MAX_FRAME_BYTES)) is not None:
            # The kernel ends us when it has run out, whatever we are in the middle of.
            signal.setitimer(signal.ITIMER_PROF, cpu_s)
            record = answer(frame)
            signal.setitimer(signal.ITIMER_PROF, 0.0)
            send_frame(peer, record)
    return 0
