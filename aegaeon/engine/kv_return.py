"""What another instance prefilled goes to the host as soon as it has ended: its next turn is
prefilled there again, and finds it."""

import logging
import threading

from aegaeon.engine.kv_spill import Spill
from aegaeon.errors import DeviceError

COPY_S = 60.0

log = logging.getLogger(__name__)


class Return:
    """Has `spill` go on while there is something to bring out, on a thread of its own that begins
    with the first time; `lock` is over all that it touches."""

    def __init__(self, spill: Spill, lock: threading.Lock) -> None:
        self._spill = spill
        self._lock = lock
        self._thread: threading.Thread | None = None
        self._is_wanted = threading.Event()
        self._is_closing = False

    def begin(self) -> None:
        """Bring out what has come to rest. The caller holds the lock."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kv return", daemon=True)
            self._thread.start()
        self._is_wanted.set()

    def close(self) -> None:
        """Bring out no more; the caller does not hold the lock. Idempotent."""
        self._is_closing = True
        with self._lock:
            self._spill.stop()
            thread = self._thread
        self._is_wanted.set()
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        try:
            while not self._is_closing:
                self._is_wanted.wait()
                self._is_wanted.clear()
                while self._brings_out():
                    pass
        except DeviceError:
            return  # the compute lane finds that, too, and says so
        except Exception:
            log.exception("bringing keys and values out failed; the next that end try again")
            with self._lock:
                self._thread = None

    def _brings_out(self) -> bool:
        """Copy what rests now, wait for it and let it be found; False when there was nothing."""
        with self._lock:
            if self._is_closing:
                return False
            self._spill.begin()
            ticket = self._spill.ticket
        if ticket is None:
            return False
        if not ticket.wait(timeout_s=COPY_S):
            ticket.cancel()
        return True
