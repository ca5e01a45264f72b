"""How many models load at once on a node: loads beyond that wait for one to end.

A slot is a file that is locked; the system unlocks what a dead process held.
"""

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from aegaeon.store.names import LOADS, region_path
from aegaeon.types import Load, ModelId, Outcome

log = logging.getLogger(__name__)

LOOK_S = 0.02
# Then it goes on without: whoever holds the slots does not end, and requests wait.
LONGEST_S = 60.0


class LoadSlots:
    """The `count` slots of a domain. Used by the thread that loads."""

    def __init__(
        self,
        directory: Path,
        domain: str,
        count: int,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._paths = [region_path(directory, domain, LOADS, str(n)) for n in range(count)]
        self._pause = pause

    def bounded(
        self, load: Callable[[Load], Outcome], is_resident: Callable[[ModelId], bool]
    ) -> Callable[[Load], Outcome]:
        """Return `load`, which waits for a slot where it brings weights in."""

        def with_slot(action: Load) -> Outcome:
            if is_resident(action.model):
                return load(action)
            with self.held(action.model):
                return load(action)

        return with_slot

    @contextmanager
    def held(self, model: ModelId) -> Iterator[None]:
        """Hold a slot, or none where none came free for long."""
        looks = int(LONGEST_S / LOOK_S)
        slot = self._take()
        while slot is None and looks:
            looks -= 1
            self._pause(LOOK_S)
            slot = self._take()
        if slot is None:
            log.warning("no load of %s has ended for long; loading beside them", model)
        try:
            yield
        finally:
            if slot is not None:
                os.close(slot)

    def _take(self) -> int | None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        for path in self._paths:
            slot = os.open(path, flags, 0o600)
            try:
                fcntl.flock(slot, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(slot)
            else:
                return slot
        return None
