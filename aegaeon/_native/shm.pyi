"""Rings and tables in shared memory (csrc/shm)."""

from typing import final

@final
class Ring:
    """A bounded ring of byte records: many writers in any process and thread, one reader.

    A writer may be killed at any instruction: what it committed arrives, whole and in order, and
    what it had not committed never shows. The memory stays mapped until the object is collected.
    """

    @staticmethod
    def create(path: str, capacity_bytes: int) -> Ring:
        """Make the ring and become its reader; the capacity is rounded up to a power of two.

        Raises RegionError when `path` exists or there is no room for it.
        """

    @staticmethod
    def attach(path: str) -> Ring:
        """Open the ring for sending. Raises RegionError (none there), RegionMismatch."""

    def send(self, record: bytes, timeout_s: float = 0.0) -> None:
        """Append `record`, up to 1 MiB, and wake the reader; committed when this returns.

        Raises RingFull after `timeout_s` without room, RecordTooLarge, RegionMismatch (damaged),
        and RingClosed when the reader has closed the ring, was found dead, or `path` was unlinked.
        """

    def receive(self, timeout_s: float, max_records: int = 1024) -> list[bytes]:
        """Return what has come, in order per writer; wait up to `timeout_s` when there is nothing.

        One call hands out about 256 KiB at most: long records come a few at a time. An empty list
        means that the time passed or that `wake` was called. For the creating process only, one
        thread at a time: else RegionError, RuntimeError. Raises RingClosed after `close`,
        RegionMismatch when the ring is damaged.
        """

    def look_at_most(self, longest_s: float) -> None:
        """For the reader, before it receives: let it look for a record so long at most (from 50 us
        to 4 ms) before it sleeps. A sleeper on an idle processor is woken some 20 to 50 us late; a
        reader to whom records come every few milliseconds looks nearly all the time."""

    def wake(self) -> None:
        """Make the reader's present or next wait return at once. From any thread or process."""

    def close(self) -> None:
        """Let go; idempotent. When the reader closes, all senders get RingClosed from then on."""

    @property
    def capacity_bytes(self) -> int:
        """Room for records, each of which takes 8 bytes more than its length rounded up to 8."""

    @property
    def pending_bytes(self) -> int:
        """Bytes of the capacity that are taken at this moment."""

    @property
    def has_reader(self) -> bool:
        """Whether its creator lives and has not closed it; else nobody will ever read it."""

@final
class Table:
    """Leased entries by key (1 to 64 bytes): readers never wait, writers only for each other.

    A writer may be killed at any instruction and leaves the old entry, the new one or none. An
    entry whose lease has ended is not there. put, renew, get and remove cost the same whatever
    the table holds.
    """

    @staticmethod
    def create(path: str, slots: int, slot_bytes: int) -> Table:
        """Make a table of at least `slots` entries with values up to `slot_bytes`.

        Above 64 slots it comes in sets of 64, of which a key has one: TableFull may come before
        the last slot is taken, so ask for twice what you need. Raises RegionError.
        """

    @staticmethod
    def attach(path: str) -> Table:
        """Open the table. Raises RegionError (none there), RegionMismatch."""

    @staticmethod
    def open_or_create(path: str, slots: int, slot_bytes: int) -> Table:
        """Attach, or create where there is none; any number of processes may do so at once.

        Raises RegionMismatch when the table there has other sizes.
        """

    def put(self, key: bytes, value: bytes, lease_s: float, fence: int = 0) -> None:
        """Enter or replace, for `lease_s` seconds.

        Raises StaleIncarnation when a live entry of `key` has a higher fence, TableFull,
        RecordTooLarge (key or value), RegionMismatch (damaged).
        """

    def renew(self, key: bytes, value: bytes, lease_s: float, fence: int) -> None:
        """Replace a live entry that has exactly this fence, else raise StaleIncarnation."""

    def put_evicting(self, key: bytes, value: bytes, lease_s: float) -> None:
        """Like `put` with fence 0, but takes the slot that expires first where none is free."""

    def get(self, key: bytes) -> bytes | None:
        """Return the live value of `key`, or None."""

    def remove(self, key: bytes, fence: int) -> bool:
        """Take out the live entry of `key` of exactly this fence; say whether it was there."""

    def items(self) -> list[tuple[bytes, bytes]]:
        """Return all live entries, each whole, in no order; linear in the slots."""

    def close(self) -> None:
        """Let go; what the table holds stays. Idempotent."""

    @property
    def slots(self) -> int:
        """Entries there is room for: as asked, rounded up to whole sets."""

    @property
    def slot_bytes(self) -> int:
        """The longest value."""

def unlink(path: str) -> bool:
    """Remove a region; False when there was none. A ring's senders get RingClosed from then on."""
