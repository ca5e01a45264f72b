"""Processes that do what strangers ask, with bounds on time and memory that the kernel holds."""

import contextlib
import logging
import queue
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field

import msgspec

from aegaeon.config import child_environment
from aegaeon.errors import Overloaded
from aegaeon.proxy.bounded_worker import MAX_FRAME_BYTES
from aegaeon.proxy.frames import receive_frame, send_frame

log = logging.getLogger(__name__)

ANSWER_S = 15.0  # a process that is not even given the processor is given up
ENDED_S = 2.0  # for one that has let go of its socket to be gone
CROWDED_S = 0.25  # waited for a process before another one is started
# By the timer and by allocations that fail; anything else is not what was asked's fault.
_EXCESSES = {-signal.SIGPROF, -signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS}


class Bounds(msgspec.Struct, frozen=True):
    """What `count` processes may take each: `cpu_s` for an answer, `memory_bytes` of addresses."""

    cpu_s: float
    memory_bytes: int
    count: int


@dataclass(slots=True)
class BoundedProcess:
    """One process; used by one thread at a time."""

    process: "subprocess.Popen[bytes]"
    peer: socket.socket
    known: set[int] = field(default_factory=set)  # what its owner has told it already

    def ask(self, asked: bytes) -> bytes | None:
        """Return its answer, or None when it is gone or is given up."""
        try:
            send_frame(self.peer, asked)
            answer = receive_frame(self.peer, MAX_FRAME_BYTES)
        except OSError as error:
            log.warning("bounded process lost pid=%d error=%s", self.process.pid, error)
            return None
        if answer is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(ENDED_S)  # which tells why
        return answer

    def end(self) -> bool:
        """End and reap it. Return whether it had come to its bounds before."""
        self.peer.close()
        self.process.kill()
        try:
            return self.process.wait(ENDED_S) in _EXCESSES
        except subprocess.TimeoutExpired:
            # The kernel is not done with it; it is reaped when another process is started.
            log.warning("bounded process does not end pid=%d", self.process.pid)
            return False


class BoundedProcesses:
    """Processes of one module, which start when first needed, until `close`. Any thread may call
    any verb."""

    def __init__(self, module: str, bounds: Bounds) -> None:
        self._module = module
        self._bounds = bounds
        self._lock = threading.Lock()
        self._idle: queue.LifoQueue[BoundedProcess] = queue.LifoQueue()
        self._count = 0
        self._is_closed = False

    def take(self) -> BoundedProcess:
        """Return a process that lives and is nobody else's until it is given back or buried. Raises
        Overloaded."""
        with contextlib.suppress(queue.Empty):
            while True:
                process = self._idle.get(timeout=CROWDED_S if self._count else 0.001)
                if process.process.poll() is None:
                    return process
                self.bury(process)
        with self._lock:
            if self._is_closed:
                raise Overloaded("the server is stopping; ask again later")
            may_start = self._count < self._bounds.count
            self._count += may_start
        if may_start:
            try:
                return self._start()
            except BaseException:
                with self._lock:
                    self._count -= 1
                raise
        try:
            return self._idle.get(timeout=ANSWER_S)
        except queue.Empty:
            raise Overloaded("too many requests are being prepared; ask again later") from None

    def give_back(self, process: BoundedProcess) -> None:
        """Let others have it."""
        with self._lock:
            is_closed = self._is_closed
            if not is_closed:
                self._idle.put(process)
        if is_closed:
            self.bury(process)

    def bury(self, process: BoundedProcess) -> bool:
        """End one that was taken. Return whether it had come to its bounds before."""
        is_excess = process.end()
        with self._lock:
            self._count -= 1
        return is_excess

    def close(self) -> None:
        """End the idle ones, and the others when they have answered. Idempotent."""
        with self._lock:
            self._is_closed = True
        while True:
            try:
                self.bury(self._idle.get_nowait())
            except queue.Empty:
                return

    def _start(self) -> BoundedProcess:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = self._spawn(theirs.fileno())
            except OSError as error:
                ours.close()
                raise Overloaded(f"no process could be started ({error.strerror})") from None
        ours.settimeout(ANSWER_S)
        return BoundedProcess(process, ours)

    def _spawn(self, descriptor: int) -> "subprocess.Popen[bytes]":
        bounds = (str(descriptor), str(self._bounds.cpu_s), str(self._bounds.memory_bytes))
        return subprocess.Popen(
            [sys.executable, "-m", self._module, *bounds],
            stdin=subprocess.DEVNULL,
            pass_fds=(descriptor,),
            env=child_environment({"RUST_BACKTRACE": "0"}),
        )
