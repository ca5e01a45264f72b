"""What is on its way to proxies and other instances: a bounded queue per destination, retried
while that is full.

Which requests belong to a destination that is gone is the runtime's business.
"""

import itertools
import logging
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from aegaeon.errors import RecordTooLarge, RingClosed, RingFull, StoreUnavailable
from aegaeon.explanations import Explained
from aegaeon.store.base import Mailbox
from aegaeon.store.codec import encode, joined
from aegaeon.types import InstanceMessage, Reply, TokenEvent

log = logging.getLogger(__name__)

MAX_RECORD_BYTES = 1 << 20  # what a mailbox takes
MAX_JOINED = 1024  # tokens of a step that go as one record
MAX_PENDING = 65536  # records per destination
MAX_IDLE_DESTINATIONS = 64
GONE_S = 10.0  # a destination that takes nothing for so long is gone


@dataclass(slots=True)
class _Destination:
    mailbox: Mailbox | None = None
    # Records, and whether each tells of tokens, which may go together.
    pending: deque[tuple[bytes, bool]] = field(default_factory=deque)
    stuck_since_s: float | None = None


class Outbox:
    """Owned by one loop, never blocks. Mailboxes are opened when first written to."""

    def __init__(self, open_mailbox: Callable[[str], Mailbox]) -> None:
        self._open = open_mailbox
        self._destinations: OrderedDict[str, _Destination] = OrderedDict()

    @property
    def has_pending(self) -> bool:
        """Whether anything waits for room."""
        return any(d.pending for d in self._destinations.values())

    def is_pending(self, address: str) -> bool:
        """Whether anything for `address` has not been sent yet."""
        destination = self._destinations.get(address)
        return destination is not None and bool(destination.pending)

    def post(self, address: str, message: Reply | InstanceMessage | Explained) -> None:
        """Queue `message`; `flush` sends it, after those before it. Raises RecordTooLarge."""
        record = encode(message)
        if len(record) > MAX_RECORD_BYTES:
            raise RecordTooLarge(f"{len(record)} bytes are too many for a message; ask for less")
        destination = self._destinations.setdefault(address, _Destination())
        self._destinations.move_to_end(address)
        destination.pending.append((record, isinstance(message, TokenEvent)))

    def flush(self, now: float) -> tuple[str, ...]:
        """Send what there is room for; return, once, the destinations that are gone."""
        gone = []
        try:
            for address, destination in self._destinations.items():
                if not self._send(address, destination, now):
                    gone.append(address)
        except StoreUnavailable as error:
            # No destination's fault, and no use to try the others.
            log.debug("nothing sent error=%s", error)
        for address in gone:
            self._drop(address)
        idle = [a for a, d in self._destinations.items() if not d.pending]
        for address in idle[: len(self._destinations) - MAX_IDLE_DESTINATIONS]:
            self._drop(address)
        return tuple(gone)

    def close(self) -> None:
        """Let go of all destinations; what is still queued is lost."""
        for address in tuple(self._destinations):
            self._drop(address)

    def _send(self, address: str, destination: _Destination, now: float) -> bool:
        """Send until full; say whether the destination is alive. Raises StoreUnavailable."""
        pending = destination.pending
        try:
            while pending:
                if destination.mailbox is None:
                    destination.mailbox = self._open(address)
                for _ in range(_send_first(destination.mailbox, pending)):
                    pending.popleft()
                destination.stuck_since_s = None
        except RingClosed:
            log.info("destination closed address=%s unsent=%d", address, len(pending))
            return False
        except RecordTooLarge as error:
            log.error("record dropped address=%s error=%s", address, error)
            pending.popleft()
        except StoreUnavailable:
            if len(pending) <= MAX_PENDING:
                raise
            log.warning("too much for a store that is away address=%s", address)
            return False
        except RingFull:
            if destination.stuck_since_s is None:
                destination.stuck_since_s = now
            is_gone = now - destination.stuck_since_s > GONE_S or len(pending) > MAX_PENDING
            if is_gone:
                log.warning("destination takes nothing address=%s unsent=%d", address, len(pending))
            return not is_gone
        return True

    def _drop(self, address: str) -> None:
        mailbox = self._destinations.pop(address).mailbox
        if mailbox is not None:
            mailbox.close()


def _send_first(mailbox: Mailbox, pending: deque[tuple[bytes, bool]]) -> int:
    """Send the first records, as one where they may go together; return how many. Raises as
    Mailbox.send."""
    together = itertools.takewhile(lambda one: one[1], pending)
    tokens = [record for record, _ in itertools.islice(together, MAX_JOINED)]
    if len(tokens) > 1:
        try:
            mailbox.send(joined(tokens))
            return len(tokens)
        except (RingFull, RecordTooLarge):
            pass  # there may be room for less
    mailbox.send(pending[0][0])
    return 1
