"""The proxy's way out to the instances: who lives, who gets a request, and the sending.

Everything here may block for a moment (a lock, a socket), so the gateway calls it on one thread
of its own, which makes it the only user of the store's sending side.
"""

import logging
import threading
import time
from collections import Counter
from typing import NamedTuple

from aegaeon.config import Settings
from aegaeon.errors import AegaeonError, Overloaded, RecordTooLarge, RingClosed, RingFull
from aegaeon.scheduler.dispatch import dispatch
from aegaeon.store.base import Domain, Mailbox
from aegaeon.store.codec import encode
from aegaeon.types import (
    Cancel,
    Instance,
    InstanceId,
    InstanceMessage,
    ModelId,
    Request,
    RequestId,
    Submit,
)

log = logging.getLogger(__name__)

# A snapshot is good for this long; routing reads the store at most this often.
SNAPSHOT_AGE_S = 0.005
_SEND_TIMEOUT_S = 0.05


class Target(NamedTuple):
    """One life of one instance."""

    instance: InstanceId
    incarnation: int


class Outbox:
    """Picks instances and sends to them. One thread calls all verbs but `assign` and `settle`."""

    def __init__(self, domain: Domain, settings: Settings) -> None:
        self._domain = domain
        self._settings = settings
        self._store = domain.metadata()
        self._instances: tuple[Instance, ...] = ()
        self._read_s = float("-inf")
        self._mailboxes: dict[Target, Mailbox] = {}
        # Lives whose mailbox was found closed; the table will notice a little later.
        self._closed: set[Target] = set()
        # What we sent and still expect answers to: newer than what instances publish.
        self._lock = threading.Lock()
        self._sent: Counter[tuple[Target, ModelId]] = Counter()

    def snapshot(self) -> tuple[Instance, ...]:
        """Return the live instances, at most SNAPSHOT_AGE_S old. Raises StoreUnavailable."""
        now = time.monotonic()
        if now - self._read_s >= SNAPSHOT_AGE_S:
            rows = self._store.sync_for_routing()
            self._read_s = now
            if rows is not self._instances:
                self._forget_dead(rows)
            self._instances = tuple(row for row in rows if target_of(row) not in self._closed)
        return self._instances

    def submit(self, request: Request, refused: frozenset[Target]) -> Target | None:
        """Send `request` to the instance that suits best, none of `refused`; None: nobody can.

        Raises Overloaded (mailbox full), RecordTooLarge, StoreUnavailable.
        """
        while True:
            barred = refused | self._closed
            rows = tuple(row for row in self.snapshot() if target_of(row) not in barred)
            instance = dispatch(rows, request.model, self._unseen(rows))
            row = next((row for row in rows if row.record.id == instance), None)
            if row is None:
                return None
            target = target_of(row)
            ttl_s = max(request.deadline_s - time.monotonic(), 1.0)
            self._store.record_assignment(request.id, target.instance, ttl_s)
            try:
                self._send(target, row.record.mailbox, Submit(request))
            except RingClosed:
                self._closed.add(target)
                continue
            except RingFull:
                raise Overloaded(f"instance {target.instance} is behind; try again") from None
            self.assign(target, request.model)
            return target

    def cancel(self, cancel: Cancel, target: Target) -> None:
        """Tell `target`, if it still lives, that nobody waits for a request."""
        try:
            mailbox = self._mailboxes.get(target)
            if mailbox is None:  # what runs there came from another instance
                row = next((row for row in self.snapshot() if target_of(row) == target), None)
                if row is None:
                    return
                mailbox = self._open(target, row.record.mailbox)
            mailbox.send(encode(cancel), timeout_s=1.0)
        except RingClosed:
            self._closed.add(target)
        except AegaeonError as error:
            # The instance ends the request itself at its deadline.
            log.warning("cancel not delivered request=%s error=%s", cancel.request_id, error)

    def note_move(self, request: RequestId, target: Target, ttl_s: float) -> None:
        """Record that `request` lives at `target` now. Raises StoreUnavailable."""
        self._store.record_assignment(request, target.instance, max(ttl_s, 1.0))

    def assign(self, target: Target, model: ModelId) -> None:
        """Count one request at `target` that came there without us. Callable from any thread."""
        with self._lock:
            self._sent[target, model] += 1

    def settle(self, target: Target, model: ModelId) -> None:
        """Stop counting one request at `target`: it ended or moved. Callable from any thread."""
        with self._lock:
            self._sent[target, model] -= 1
            if self._sent[target, model] <= 0:
                del self._sent[target, model]

    def close(self) -> None:
        """Let go of the mailboxes and the table."""
        for mailbox in self._mailboxes.values():
            mailbox.close()
        self._mailboxes.clear()
        self._store.close()

    def _send(self, target: Target, address: str, message: InstanceMessage) -> None:
        mailbox = self._mailboxes.get(target) or self._open(target, address)
        record = encode(message)
        if len(record) > 1 << 20:
            raise RecordTooLarge("the prompt is too long for one message; shorten it")
        mailbox.send(record, timeout_s=_SEND_TIMEOUT_S)

    def _open(self, target: Target, address: str) -> Mailbox:
        mailbox = self._mailboxes[target] = self._domain.open_mailbox(address)
        return mailbox

    def _forget_dead(self, rows: tuple[Instance, ...]) -> None:
        alive = {target_of(row) for row in rows}
        for target in self._mailboxes.keys() - alive:
            self._mailboxes.pop(target).close()
        self._closed &= alive

    def _unseen(self, rows: tuple[Instance, ...]) -> dict[InstanceId, int]:
        """Count per instance what we sent there and it has not published yet."""
        published = {target_of(row): row.status for row in rows}
        unseen: Counter[InstanceId] = Counter()
        with self._lock:
            for (target, model), sent in self._sent.items():
                status = published.get(target)
                if status is not None:
                    known = status.waiting.get(model, 0) + status.running.get(model, 0)
                    unseen[target.instance] += max(sent - known, 0)
        return unseen


def target_of(row: Instance) -> Target:
    """Return the life that `row` describes."""
    return Target(row.record.id, row.record.incarnation)
