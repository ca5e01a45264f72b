"""Shared memory and process control, written in C++ (csrc/).

Paths are absolute file paths, in practice under /dev/shm. Times are seconds; leases and deadlines
run on CLOCK_MONOTONIC, the clock of time.monotonic. Errors are the classes of aegaeon.errors.
Waits release the GIL and run Python's signal handlers at least every 50 ms.
"""

from collections.abc import Sequence
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

@final
class KvPool:
    """One client of a pool of KV blocks: an arena of slabs, each cut into blocks of one shape.

    `shapes` are (block bytes, page bytes, encoding): a shape is named by its place among them, a
    block by its first page. Any thread may call any verb, in the process that opened the pool
    (else RegionError). A process may be killed at any instruction: every block is free or
    somebody's, and what the dead held is reclaimed, zeroed. A buffer of the arena's bytes.
    Raises IndexError for no shape, ValueError for no block, RegionMismatch (damaged).
    """

    @staticmethod
    def open_private(
        slabs: tuple[int, int],
        shapes: Sequence[tuple[int, int, int]],
        quota_bytes: int,
        address: int = 0,
    ) -> KvPool:
        """Make a pool of (slab bytes, slab count) in memory of our own, or zeroed at `address`."""

    @staticmethod
    def open_shared(
        path: str,
        slabs: tuple[int, int],
        shapes: Sequence[tuple[int, int, int]],
        quota_bytes: int,
    ) -> KvPool:
        """Become a client of the pool at `path` and `path`+arena, made where there is none.

        Memory is reserved slab by slab, when one is first used. Raises RegionMismatch (other
        sizes, damaged), RegionError (no room for its control, or 64 clients live).
        """

    def allocate(self, shape: int, count: int) -> list[int]:
        """Return `count` blocks or raise OutOfBlocks: no free slab, no memory, or over the quota.

        Not zeroed, but whatever lies in them is finite in the shape's encoding, or freed as such.
        """

    def free(
        self, shape: int, blocks: Sequence[int], is_poisoned: bool = False, offer: int = 0
    ) -> None:
        """Free those that are ours (and still under `offer`); `is_poisoned` zeroes them first.

        Waits, 2 s at most, where another client is in the middle of taking one.
        """

    def offer(self, shape: int, blocks: Sequence[int]) -> int | None:
        """Return an identity, good for one `take` of these; None when one is not ours any more."""

    def take(self, shape: int, blocks: Sequence[int], sender: int) -> bool:
        """Make all of them ours if all are the sender's. Raises OutOfBlocks over the quota."""

    def reclaim(self) -> int:
        """Free what the dead hold; return how many blocks. Raises RegionError (lock is held)."""

    def close(self) -> None:
        """Free all we hold, and leave; idempotent. Buffers stay readable."""

    def free_blocks(self, shape: int) -> int:
        """Return how many could be allocated now: looks at every block, microseconds per GB."""

    def time_allocations(self, shape: int, held: int, rounds: int) -> float:
        """Return nanoseconds to allocate a block while `held` others are ours: rounds of 64."""

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks that we hold: looks at every block."""

    @property
    def quota_bytes(self) -> int:
        """The most that we may hold."""

    @property
    def identity(self) -> int:
        """This client; what its blocks may be taken by."""

    @property
    def address(self) -> int:
        """Where the arena begins in this process."""

    def __buffer__(self, flags: int) -> memoryview: ...

def unlink(path: str) -> bool:
    """Remove a region; False when there was none. A ring's senders get RingClosed from then on."""

def die_with_parent(signal: int, parent_pid: int = 0) -> None:
    """Have the kernel send us `signal` when the thread that started this process ends.

    With `parent_pid`, a parent that was gone before this call counts too: the signal comes at
    once. It is the starting thread, not its process, that counts: start such children from one
    that lives as long as they may.
    """
