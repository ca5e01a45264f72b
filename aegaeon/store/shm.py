"""The store of one node in shared memory: two native tables, and one native ring per mailbox.

Leases run on the node's monotonic clock. Nothing here outlives a reboot, and nothing needs a
server; domains.py sees to what killed processes leave.
"""

import weakref
from pathlib import Path

from aegaeon import _native
from aegaeon.errors import RegionError, RingClosed, StaleIncarnation
from aegaeon.store.base import LOOK_S, Board, Domain, Mailbox, MetadataStore
from aegaeon.store.board import FileBoard
from aegaeon.store.catalog import CatalogStore, FileCatalogStore
from aegaeon.store.names import MAILBOX, SHARED_MEMORY, check_name, domain_files, region_path
from aegaeon.store.rows import ROW_BYTES, RowWriter, SeenRow
from aegaeon.types import Instance, InstanceId, InstanceRecord, InstanceStatus, RequestId

INSTANCES = "instances"
INSTANCE_SLOTS = 64  # one set of the table: full only when all are taken
ASSIGNMENTS = "assignments"
ASSIGNMENT_SLOTS = 1 << 15
ASSIGNMENT_BYTES = 64


class PosixShmMetadataStore(MetadataStore):
    """The table of a node. Request and instance ids have up to 64 bytes (RecordTooLarge)."""

    def __init__(self, domain: str, directory: Path = SHARED_MEMORY) -> None:
        """Open the table of `domain`, or create it. Raises RegionError, RegionMismatch."""
        instances = str(region_path(directory, domain, INSTANCES))
        assignments = str(region_path(directory, domain, ASSIGNMENTS))
        self._paths = (instances, assignments)
        self._instances = _native.Table.open_or_create(instances, INSTANCE_SLOTS, ROW_BYTES)
        self._assignments = _native.Table.open_or_create(
            assignments, ASSIGNMENT_SLOTS, ASSIGNMENT_BYTES
        )
        # Rows that have not changed are not decoded again.
        self._seen: dict[bytes, SeenRow] = {}
        self._writer = RowWriter()

    def register_instance(self, record: InstanceRecord, lease_s: float) -> None:
        """See MetadataStore."""
        row = self._writer.entered(record, lease_s)
        self._instances.put(record.id.encode(), row, lease_s, record.incarnation)

    def update_instance_status(
        self, instance: InstanceId, incarnation: int, status: InstanceStatus
    ) -> None:
        """See MetadataStore."""
        key = instance.encode()
        value = self._instances.get(key)
        if value is None:
            raise StaleIncarnation(
                f"incarnation {incarnation} of {instance} holds no lease; register it again, "
                "or exit when it has been replaced"
            )
        # Only an incarnation changes its own record, and the fence lets no other one's pass.
        fresh, lease_s = self._writer.renewed(value, status)
        self._instances.renew(key, fresh, lease_s, incarnation)

    def remove_instance(self, instance: InstanceId, incarnation: int) -> None:
        """See MetadataStore."""
        self._instances.remove(instance.encode(), incarnation)

    def sync_for_routing(self) -> tuple[Instance, ...]:
        """See MetadataStore."""
        rows = sorted(self._instances.items())
        known = self._seen
        self._seen = {key: _seen(known.get(key), value) for key, value in rows}
        return tuple(seen.instance for seen in self._seen.values())

    def record_assignment(self, request: RequestId, instance: InstanceId, ttl_s: float) -> None:
        """See MetadataStore."""
        self._assignments.put_evicting(request.encode(), instance.encode(), ttl_s)

    def get_assignment(self, request: RequestId) -> InstanceId | None:
        """See MetadataStore."""
        value = self._assignments.get(request.encode())
        return None if value is None else value.decode()

    def close(self) -> None:
        """See MetadataStore."""
        self._instances.close()
        self._assignments.close()

    def unlink(self) -> None:
        """See MetadataStore."""
        for path in self._paths:
            _native.unlink(path)


class ShmMailbox(Mailbox):
    """A native ring under the name of its address."""

    def __init__(self, ring: _native.Ring, path: Path, is_reader: bool) -> None:
        """Take over `ring`, which stands at `path`."""
        self._ring = ring
        self._path = path
        self._file_id = path.stat().st_ino if is_reader else None
        # The method below, without a second call: a third of the time a short record takes.
        self.send = ring.send  # type: ignore[method-assign]

    def send(self, record: bytes, timeout_s: float = 0.0) -> None:
        """See Mailbox."""
        self._ring.send(record, timeout_s)

    def receive(self, timeout_s: float, max_records: int = 1024) -> list[bytes]:
        """See Mailbox."""
        return self._ring.receive(timeout_s, max_records)

    def wake(self) -> None:
        """See Mailbox."""
        self._ring.wake()

    def close(self) -> None:
        """See Mailbox."""
        self._ring.close()

    def unlink(self) -> None:
        """See Mailbox. Leaves alone what a successor has put under the same name."""
        try:
            if self._file_id == self._path.stat().st_ino:
                _native.unlink(str(self._path))
        except FileNotFoundError:
            return


class ShmDomain(Domain):
    """The regions of one domain as files in `directory`, which must be a tmpfs of this node.

    Opened mailboxes are not cached: keep the handle, and open again after RingClosed.
    """

    def __init__(self, name: str, directory: Path = SHARED_MEMORY) -> None:
        """Name the domain; creates nothing. Raises ConfigError on a bad name."""
        self._name = check_name("domain", name)
        self._directory = directory
        self._stores: weakref.WeakSet[PosixShmMetadataStore] = weakref.WeakSet()
        self._boards: weakref.WeakSet[FileBoard] = weakref.WeakSet()
        self._created: weakref.WeakSet[ShmMailbox] = weakref.WeakSet()
        self._opened: weakref.WeakSet[ShmMailbox] = weakref.WeakSet()

    def metadata(self) -> MetadataStore:
        """See Domain. Raises RegionError without room for it."""
        store = PosixShmMetadataStore(self._name, self._directory)
        self._stores.add(store)
        return store

    def catalog(self) -> CatalogStore:
        """See Domain."""
        return FileCatalogStore(self._directory, self._name)

    def board(self) -> Board:
        """See Domain."""
        board = FileBoard(self._name, self._directory)
        self._boards.add(board)
        return board

    def create_mailbox(
        self, address: str, capacity_bytes: int = 4 << 20, look_s: float = LOOK_S
    ) -> Mailbox:
        """See Domain. Raises RegionError without room for it; a capacity is a power of two."""
        path = self._mailbox_path(address)
        _native.unlink(str(path))
        ring = _native.Ring.create(str(path), capacity_bytes)
        ring.look_at_most(look_s)
        mailbox = ShmMailbox(ring, path, is_reader=True)
        self._created.add(mailbox)
        return mailbox

    def open_mailbox(self, address: str) -> Mailbox:
        """See Domain. Raises RegionMismatch when another version made it."""
        path = self._mailbox_path(address)
        try:
            ring = _native.Ring.attach(str(path))
        except RegionError:
            if path.exists():
                raise
            raise RingClosed(f"mailbox {address} has no reader; look its owner up again") from None
        mailbox = ShmMailbox(ring, path, is_reader=False)
        self._opened.add(mailbox)
        return mailbox

    def close(self) -> None:
        """See Domain."""
        for mailbox in (*self._created, *self._opened):
            mailbox.close()
        for store in self._stores:
            store.close()
        for board in self._boards:
            board.close()

    def unlink(self) -> None:
        """See Domain. The lock of a claim stays: it belongs to who claimed."""
        remove_domain(self._name, self._directory)

    def _mailbox_path(self, address: str) -> Path:
        return region_path(self._directory, self._name, MAILBOX, check_name("mailbox", address))


def remove_domain(name: str, directory: Path = SHARED_MEMORY) -> int:
    """Remove all regions of the domain `name`, not its lock; return how many there were."""
    return sum(_native.unlink(str(path)) for path in domain_files(directory, name))


def _seen(before: SeenRow | None, row: bytes) -> SeenRow:
    return before if before is not None and before.row == row else SeenRow(row, before)
