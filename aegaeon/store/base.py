"""The seams of the store: MetadataStore, Mailbox, Board and the Domain that makes them.

Implementations: local (in process, the reference), shm (the default), redis. One contract suite
in tests/store runs against all three.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

from aegaeon.store.catalog import CatalogStore
from aegaeon.types import Instance, InstanceId, InstanceRecord, InstanceStatus, RequestId

LOOK_S = 0.004  # to look for a message before sleeping is worth it up to a step of a device


class MetadataStore(ABC):
    """Who serves, and who serves which request. Every entry is leased and vanishes by itself."""

    @abstractmethod
    def register_instance(self, record: InstanceRecord, lease_s: float) -> None:
        """Enter `record` with status `starting`, replacing an older incarnation of the same id.

        Raises StaleIncarnation when a newer incarnation is registered, TableFull without a slot.
        """

    @abstractmethod
    def update_instance_status(
        self, instance: InstanceId, incarnation: int, status: InstanceStatus
    ) -> None:
        """Publish `status` and renew the lease, atomically.

        Raises StaleIncarnation when the lease has ended or a newer incarnation is registered.
        """

    @abstractmethod
    def remove_instance(self, instance: InstanceId, incarnation: int) -> None:
        """Take the entry out if it is still this incarnation's. Where instances may be cut off from
        the store, this one, which others take to be gone, cannot enter itself again from then on.
        """

    @abstractmethod
    def sync_for_routing(self) -> tuple[Instance, ...]:
        """Return the instances whose leases are alive, by id; never waits for a writer."""

    @abstractmethod
    def record_assignment(self, request: RequestId, instance: InstanceId, ttl_s: float) -> None:
        """Remember for `ttl_s` that `request` went to `instance`; the cost does not grow."""

    @abstractmethod
    def get_assignment(self, request: RequestId) -> InstanceId | None:
        """Return where `request` went, or None when unknown or expired."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the store; what it holds stays. Idempotent."""

    @abstractmethod
    def unlink(self) -> None:
        """Remove the store and what it holds, for everyone. Idempotent."""


class Mailbox(ABC):
    """A bounded queue of byte records: many writers in any process, one reader."""

    @abstractmethod
    def send(self, record: bytes, timeout_s: float = 0.0) -> None:
        """Append `record` (up to 1 MiB) and wake the reader; committed when this returns.

        Raises RingFull after `timeout_s` without room, RecordTooLarge, RingClosed.
        """

    @abstractmethod
    def receive(self, timeout_s: float, max_records: int = 1024) -> list[bytes]:
        """Return what has come, in order per writer; wait up to `timeout_s` when there is nothing.

        An empty list means the time passed or `wake` was called. Only the creator may call this.
        """

    @abstractmethod
    def wake(self) -> None:
        """Make the reader's present or next wait return at once. Callable from any thread."""

    @abstractmethod
    def close(self) -> None:
        """Let go. When the reader closes, senders get RingClosed from then on. Idempotent."""

    @abstractmethod
    def unlink(self) -> None:
        """Remove the mailbox's name and records. Idempotent."""


Join = Callable[[bytes | None, bytes], bytes]  # of a record, if there is one, and what to add


class Board(ABC):
    """What processes tell of themselves to whoever looks: a record each, only the last one. It
    stays when they end, as long as the domain."""

    @abstractmethod
    def publish(self, name: str, record: bytes) -> None:
        """Replace the record of `name`, whose only writer this is; others see the old one or this.

        Raises StoreUnavailable, RegionError (no room).
        """

    @abstractmethod
    def read(self) -> dict[str, bytes]:
        """Return the last record of each name, all of them whole; never waits for a writer."""

    @abstractmethod
    def fold(self, name: str, into: str, join: Join) -> bool:
        """Take the record of `name` off the board, and make that of `into` what `join` makes of it
        and of this one; False, with nothing done, unless the writer of `name` has surely ended.

        No two do so at a time. Not for a name that is used again. Raises as `publish`.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the board; what is on it stays. Idempotent."""


class Domain(ABC):
    """One named group of processes: one table, one board, and mailboxes by address."""

    @abstractmethod
    def metadata(self) -> MetadataStore:
        """Open the table; the first to ask creates it."""

    @abstractmethod
    def catalog(self) -> CatalogStore:
        """Open the catalogue of the models that are served."""

    @abstractmethod
    def board(self) -> Board:
        """Open the board."""

    @abstractmethod
    def create_mailbox(
        self, address: str, capacity_bytes: int = 4 << 20, look_s: float = LOOK_S
    ) -> Mailbox:
        """Make the mailbox `address` and become its reader; a left-over of it is replaced.

        Where waiting in the processor is a way to be quicker, `receive` does so for `look_s` at
        most before it sleeps.
        """

    @abstractmethod
    def open_mailbox(self, address: str) -> Mailbox:
        """Open `address` for sending. Raises RingClosed when nobody has created it."""

    @abstractmethod
    def close(self) -> None:
        """Close everything this object opened. Idempotent."""

    @abstractmethod
    def unlink(self) -> None:
        """Remove the domain with all its names: table, mailboxes, left-overs of dead processes."""
