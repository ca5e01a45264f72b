"""An instance's row in the table: registered once, kept alive, and up to date at a bounded rate."""

import logging
import time
from collections.abc import Callable

import msgspec

from aegaeon.errors import RecordTooLarge, StoreUnavailable
from aegaeon.store.base import MetadataStore
from aegaeon.store.rows import without_models
from aegaeon.types import Instance, InstanceRecord, InstanceStatus, ModelId

log = logging.getLogger(__name__)

MIN_INTERVAL_S = 0.02  # between two publications of changes
RENEWALS_PER_LEASE = 4


class Presence:
    """Owned by the runtime. Raises StaleIncarnation once another incarnation took the place, or
    the requests have gone elsewhere. `clock` is the runtime's."""

    def __init__(
        self,
        store: MetadataStore,
        record: InstanceRecord,
        lease_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._clock = clock
        self._record = record
        self._renew_s = lease_s / RENEWALS_PER_LEASE
        self._lease_s = lease_s
        self._is_due = False  # the record is not what the store has
        self._published: InstanceStatus | None = None
        self._published_s = float("-inf")
        self._is_over = False  # the lease, by our clock
        self._renewed_s = clock()  # when the last renewal had been sent that was answered
        store.register_instance(record, lease_s)

    @property
    def record(self) -> InstanceRecord:
        """What was registered."""
        return self._record

    def is_held(self, now: float) -> bool:
        """Whether the lease is surely ours. It ends here before it ends in the store, which counts
        from when the renewal came: who sees it ended there finds that nothing is done here."""
        return now - self._renewed_s < self._lease_s

    def others(self) -> tuple[Instance, ...]:
        """Return the rows of the node's other instances, which see the same memory. Raises
        StoreUnavailable."""
        return tuple(row for row in self.peers() if row.record.node == self._record.node)

    def peers(self) -> tuple[Instance, ...]:
        """Return the rows of the other instances, of all nodes. Raises StoreUnavailable."""
        rows, me = self._store.sync_for_routing(), self._record
        return tuple(row for row in rows if row.record.id != me.id)

    def serve(self, models: tuple[ModelId, ...]) -> None:
        """Say that these are served from here on; the status has to be published again. Where the
        table has no room for so many, nobody learns of those that have come."""
        before = self._record
        self._record = msgspec.structs.replace(self._record, models=models)
        began_s = self._clock()
        if not self.is_held(began_s):
            self._is_due = True  # first it has to be known whether we may be there at all
            return
        try:
            self._store.register_instance(self._record, self._lease_s)
            # In the meantime it counted as starting, for as long as two writes take.
            self._update(self._published or InstanceStatus())
            self._renewed_s = began_s
        except StoreUnavailable as error:
            log.warning("models not published error=%s", error)
            self._is_due = True
        except RecordTooLarge as error:
            log.error("models not published, requests for new ones will not come error=%s", error)
            self._record = before

    def publish(self, status: InstanceStatus, now: float) -> float:
        """Write `status` if it is time to, as it always is without a lease; return when to call
        again at the latest."""
        since_s = now - self._published_s
        is_changed = status != self._published
        is_over = not self.is_held(now)
        if is_over and not self._is_over:
            log.error("lease over, nothing is computed here until the store knows us again")
        self._is_over = is_over
        if is_over or since_s >= self._renew_s or (is_changed and since_s >= MIN_INTERVAL_S):
            self._write(status, now)
            is_changed = False
        wait_s = MIN_INTERVAL_S if is_changed else self._renew_s
        return self._published_s + wait_s

    def withdraw(self) -> None:
        """Take the row out, so that nothing more is sent here."""
        try:
            self._store.remove_instance(self._record.id, self._record.incarnation)
        except StoreUnavailable as error:
            log.warning("row not removed, its lease will end error=%s", error)

    def _write(self, status: InstanceStatus, now: float) -> None:
        self._published_s = now  # also after a failure: the rate stays bounded
        began_s = self._clock()
        try:
            self._update(status)
        except StoreUnavailable as error:
            log.warning("status not published error=%s", error)
            return
        self._renewed_s = began_s
        if self._is_over:
            log.info("lease goes on waiting=%s running=%s", status.waiting, status.running)
        self._published = status
        if self._is_due:
            self._is_due = False
            self.serve(self._record.models)

    def _update(self, status: InstanceStatus) -> None:
        """Write `status`; where there is no room for all of it, what routing needs least is left
        out: an instance that cannot say everything still serves. Raises StoreUnavailable."""
        record = self._record
        try:
            self._store.update_instance_status(record.id, record.incarnation, status)
        except RecordTooLarge as error:
            log.error("status published without its models error=%s", error)
            bare = without_models(status)
            self._store.update_instance_status(record.id, record.incarnation, bare)
