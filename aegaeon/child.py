"""One process that should live: started, told what to do, buried, and how long a restart waits."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from aegaeon.config import child_environment
from aegaeon.deaths import Work
from aegaeon.device.processors import THREAD_ENVIRONMENT
from aegaeon.instance.at_work import last_work, memory
from aegaeon.types import InstanceId

log = logging.getLogger(__name__)

BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 5.0, 30.0)  # before a restart, by quick deaths in a row
QUICK_DEATH_S = 10.0
REAP_S = 30.0  # for the kernel to end a killed process


@dataclass(slots=True)
class Child:
    """Owned by one thread. `index` counts instances; the proxy has none. One that `was_hung` was
    ended for that, and has not been started again. `work_fd` is where an instance notes what it
    does, from `start` to `forget_work`."""

    name: InstanceId
    index: int | None
    process: "subprocess.Popen[bytes] | None" = None
    incarnation: int = 0
    started_s: float = 0.0
    restart_at_s: float = 0.0
    quick_deaths: int = 0
    was_hung: bool = False
    work_fd: int | None = None
    starts: int = 0
    _status_fd: int | None = None

    def start(self, module: str, launch_of: Callable[[int], bytes]) -> None:
        """Run `module`, told by `launch_of` the descriptor that takes its last words.

        Raises OSError when the system does not give us a process; nothing is left open then.
        """
        self.started_s = time.monotonic()
        self.forget_work()
        if self.index is not None:
            self.work_fd = memory()
        self.starts += 1
        reading, writing = os.pipe()
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                pass_fds=(writing,) if self.work_fd is None else (writing, self.work_fd),
                env=child_environment(THREAD_ENVIRONMENT),
                start_new_session=True,  # Ctrl-C is for us; we drain in order
            )
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        self.process, self._status_fd = process, reading
        _tell(process, launch_of(writing))
        log.info("started name=%s pid=%d", self.name, process.pid)

    def bury(self) -> tuple[int, str]:
        """Let go of the process, which has ended; return its exit code and what it wrote."""
        process, self.process = self.process, None
        assert process is not None
        return process.wait(REAP_S), self._take_status()

    def last_work(self) -> Work | None:
        """Return what the process was doing that was buried; None where nobody knows."""
        return None if self.work_fd is None else last_work(self.work_fd)

    def forget_work(self) -> None:
        """Nobody asks any more what it was doing. Idempotent."""
        if self.work_fd is not None:
            os.close(self.work_fd)
            self.work_fd = None

    def back_off(self) -> float:
        """Put the restart off, longer with each quick death in a row; return how many seconds."""
        lived_s = time.monotonic() - self.started_s
        self.quick_deaths = self.quick_deaths + 1 if lived_s < QUICK_DEATH_S else 1
        wait_s = BACKOFF_S[min(self.quick_deaths, len(BACKOFF_S)) - 1]
        self.restart_at_s = time.monotonic() + wait_s
        if self.quick_deaths >= len(BACKOFF_S):
            log.error(
                "%s died %d times in a row within %.0f s of its start; the log above says why. "
                "Trying again every %.0f s",
                *(self.name, self.quick_deaths, QUICK_DEATH_S, BACKOFF_S[-1]),
            )
        return wait_s

    def kill(self) -> None:
        """End and reap the process, if there is one. Raises nothing where that takes too long."""
        if self.process is None:
            return
        if self.process.poll() is None:
            log.warning("killing name=%s pid=%d", self.name, self.process.pid)
            self.process.kill()
        try:
            self.process.wait(REAP_S)
        except subprocess.TimeoutExpired:
            # In the kernel's hands, perhaps for ever: others must not stay because of it.
            log.error(
                "not gone %.0f s after SIGKILL name=%s pid=%d", REAP_S, self.name, self.process.pid
            )
        self.process = None
        self.forget_work()
        if self._status_fd is not None:
            os.close(self._status_fd)
            self._status_fd = None

    def _take_status(self) -> str:
        if self._status_fd is None:
            return ""
        with os.fdopen(self._status_fd, encoding="utf-8", errors="replace") as status:
            self._status_fd = None
            return status.read().strip()


def _tell(process: "subprocess.Popen[bytes]", told: bytes) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(told)
        process.stdin.close()
    except BrokenPipeError:
        log.warning("died before it was told what to do pid=%d", process.pid)
