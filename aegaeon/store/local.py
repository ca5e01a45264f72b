"""The store inside one process: the reference for the contract, and for tests without processes."""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import NamedTuple

from aegaeon.errors import RecordTooLarge, RegionError, RingClosed, RingFull, StaleIncarnation
from aegaeon.store.base import LOOK_S, Board, Domain, Join, Mailbox, MetadataStore
from aegaeon.store.catalog import CatalogStore, LocalCatalogStore
from aegaeon.store.names import check_name
from aegaeon.types import Instance, InstanceId, InstanceRecord, InstanceStatus, RequestId

MAX_RECORD_BYTES = 1 << 20
RECORD_OVERHEAD_BYTES = 16
MAX_ASSIGNMENTS = 1 << 16


class _Entry(NamedTuple):
    instance: Instance
    lease_s: float
    expires_s: float


class LocalMetadataStore(MetadataStore):
    """The table as dictionaries under one lock. `clock` returns seconds and never goes back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._instances: dict[InstanceId, _Entry] = {}
        self._assignments: OrderedDict[RequestId, tuple[InstanceId, float]] = OrderedDict()

    def register_instance(self, record: InstanceRecord, lease_s: float) -> None:
        """See MetadataStore."""
        with self._lock:
            entry = self._live(record.id)
            if entry is not None and entry.instance.record.incarnation > record.incarnation:
                raise StaleIncarnation(
                    f"{record.id} is registered as incarnation "
                    f"{entry.instance.record.incarnation}, newer than {record.incarnation}; "
                    "this process has been replaced and must exit"
                )
            self._enter(Instance(record=record, status=InstanceStatus()), lease_s)

    def update_instance_status(
        self, instance: InstanceId, incarnation: int, status: InstanceStatus
    ) -> None:
        """See MetadataStore."""
        with self._lock:
            entry = self._live(instance)
            if entry is None or entry.instance.record.incarnation != incarnation:
                raise StaleIncarnation(
                    f"incarnation {incarnation} of {instance} holds no lease; register it again, "
                    "or exit when it has been replaced"
                )
            self._enter(Instance(record=entry.instance.record, status=status), entry.lease_s)

    def remove_instance(self, instance: InstanceId, incarnation: int) -> None:
        """See MetadataStore."""
        with self._lock:
            entry = self._instances.get(instance)
            if entry is not None and entry.instance.record.incarnation == incarnation:
                del self._instances[instance]

    def sync_for_routing(self) -> tuple[Instance, ...]:
        """See MetadataStore."""
        with self._lock:
            live = (self._live(name) for name in sorted(self._instances))
            return tuple(entry.instance for entry in live if entry is not None)

    def record_assignment(self, request: RequestId, instance: InstanceId, ttl_s: float) -> None:
        """See MetadataStore."""
        with self._lock:
            self._assignments[request] = (instance, self._clock() + ttl_s)
            self._assignments.move_to_end(request)
            if len(self._assignments) > MAX_ASSIGNMENTS:
                self._assignments.popitem(last=False)

    def get_assignment(self, request: RequestId) -> InstanceId | None:
        """See MetadataStore."""
        with self._lock:
            instance, expires_s = self._assignments.get(request, (None, 0.0))
            return instance if self._clock() < expires_s else None

    def close(self) -> None:
        """See MetadataStore."""

    def unlink(self) -> None:
        """See MetadataStore."""
        with self._lock:
            self._instances.clear()
            self._assignments.clear()

    def _live(self, instance: InstanceId) -> _Entry | None:
        entry = self._instances.get(instance)
        return entry if entry is not None and self._clock() < entry.expires_s else None

    def _enter(self, instance: Instance, lease_s: float) -> None:
        self._instances[instance.record.id] = _Entry(instance, lease_s, self._clock() + lease_s)


class _Queue:
    """What the handles of one mailbox share; `changed` guards all of it."""

    def __init__(self, address: str, capacity_bytes: int) -> None:
        self.address = address
        self.capacity_bytes = capacity_bytes
        self.changed = threading.Condition()
        self.records: deque[bytes] = deque()
        self.held_bytes = 0
        self.is_woken = False
        self.is_closed = False

    def has_room(self, cost_bytes: int) -> bool:
        return self.is_closed or self.held_bytes + cost_bytes <= self.capacity_bytes

    def take(self, max_records: int) -> list[bytes]:
        taken = [self.records.popleft() for _ in range(min(max_records, len(self.records)))]
        self.held_bytes -= sum(len(record) + RECORD_OVERHEAD_BYTES for record in taken)
        return taken


class LocalMailbox(Mailbox):
    """A deque under a condition; the handle that created it is the reader."""

    def __init__(self, queue: _Queue, is_reader: bool) -> None:
        self._queue = queue
        self._is_reader = is_reader

    def send(self, record: bytes, timeout_s: float = 0.0) -> None:
        """See Mailbox."""
        queue = self._queue
        cost_bytes = len(record) + RECORD_OVERHEAD_BYTES
        if len(record) > MAX_RECORD_BYTES or cost_bytes > queue.capacity_bytes:
            raise RecordTooLarge(
                f"a record of {len(record)} bytes is over the limit of mailbox {queue.address}; "
                "shorten the prompt"
            )
        with queue.changed:
            if not queue.changed.wait_for(lambda: queue.has_room(cost_bytes), timeout_s):
                raise RingFull(
                    f"mailbox {queue.address} is full ({queue.held_bytes} of "
                    f"{queue.capacity_bytes} bytes); try again later"
                )
            if queue.is_closed:
                raise closed(queue.address)
            queue.records.append(bytes(record))
            queue.held_bytes += cost_bytes
            queue.changed.notify_all()

    def receive(self, timeout_s: float, max_records: int = 1024) -> list[bytes]:
        """See Mailbox."""
        queue = self._queue
        if not self._is_reader:
            raise RegionError(f"mailbox {queue.address} was opened for sending; its creator reads")
        with queue.changed:
            queue.changed.wait_for(
                lambda: queue.records or queue.is_woken or queue.is_closed, timeout_s
            )
            if queue.is_closed:
                raise closed(queue.address)
            taken = queue.take(max_records)
            if not taken:
                queue.is_woken = False
            queue.changed.notify_all()
            return taken

    def wake(self) -> None:
        """See Mailbox."""
        with self._queue.changed:
            self._queue.is_woken = True
            self._queue.changed.notify_all()

    def close(self) -> None:
        """See Mailbox."""
        if self._is_reader:
            self.shut()

    def unlink(self) -> None:
        """See Mailbox."""
        if self._is_reader:
            self.shut()

    def shut(self) -> None:
        """Close the queue for everyone and drop what it holds."""
        with self._queue.changed:
            self._queue.is_closed = True
            self._queue.records.clear()
            self._queue.changed.notify_all()


def closed(address: str) -> RingClosed:
    """Return the error for a mailbox that nobody reads."""
    return RingClosed(f"mailbox {address} has no reader; look its owner up again")


class LocalBoard(Board):
    """The board as a dictionary under a lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._records: dict[str, bytes] = {}
        self._living: set[str] = set()

    def publish(self, name: str, record: bytes) -> None:
        """See Board."""
        with self._lock:
            self._records[check_name("record", name)] = record
            self._living.add(name)

    def read(self) -> dict[str, bytes]:
        """See Board."""
        with self._lock:
            return dict(self._records)

    def fold(self, name: str, into: str, join: Join) -> bool:
        """See Board. Writers end with this process, or by `end`."""
        with self._lock:
            if name in self._living or name not in self._records:
                return False
            self._records[into] = join(self._records.get(into), self._records[name])
            del self._records[name]
            return True

    def end(self, name: str) -> None:
        """The writer of `name` has ended."""
        with self._lock:
            self._living.discard(name)

    def close(self) -> None:
        """See Board."""

    def wipe(self) -> None:
        """Take all records off."""
        with self._lock:
            self._records.clear()
            self._living.clear()


class _Shared:
    """What the handles of one local domain share."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.metadata = LocalMetadataStore(clock)
        self.catalog = LocalCatalogStore()
        self.board = LocalBoard()
        self.lock = threading.Lock()
        self.mailboxes: dict[str, LocalMailbox] = {}


class LocalDomain(Domain):
    """A domain that lives in this process only; `join` gives another handle on the same one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._shared = _Shared(clock)
        self._created: list[LocalMailbox] = []

    def join(self) -> "LocalDomain":
        """Return a second handle, as another process would have."""
        other = LocalDomain()
        other._shared = self._shared
        return other

    def metadata(self) -> MetadataStore:
        """See Domain."""
        return self._shared.metadata

    def catalog(self) -> CatalogStore:
        """See Domain."""
        return self._shared.catalog

    def board(self) -> Board:
        """See Domain."""
        return self._shared.board

    def create_mailbox(
        self,
        address: str,
        capacity_bytes: int = 4 << 20,
        look_s: float = LOOK_S,  # noqa: ARG002  it sleeps at once
    ) -> Mailbox:
        """See Domain."""
        check_name("mailbox", address)
        mailbox = LocalMailbox(_Queue(address, capacity_bytes), is_reader=True)
        with self._shared.lock:
            left_over = self._shared.mailboxes.get(address)
            self._shared.mailboxes[address] = mailbox
        if left_over is not None:
            left_over.shut()
        self._created.append(mailbox)
        return mailbox

    def open_mailbox(self, address: str) -> Mailbox:
        """See Domain."""
        check_name("mailbox", address)
        with self._shared.lock:
            mailbox = self._shared.mailboxes.get(address)
        if mailbox is None or mailbox._queue.is_closed:
            raise closed(address)
        return LocalMailbox(mailbox._queue, is_reader=False)

    def close(self) -> None:
        """See Domain."""
        for mailbox in self._created:
            mailbox.close()
        self._created.clear()

    def unlink(self) -> None:
        """See Domain."""
        with self._shared.lock:
            mailboxes = list(self._shared.mailboxes.values())
            self._shared.mailboxes.clear()
        for mailbox in mailboxes:
            mailbox.shut()
        self._shared.metadata.unlink()
        self._shared.catalog = LocalCatalogStore()
        self._shared.board.wipe()
