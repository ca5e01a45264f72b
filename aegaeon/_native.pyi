"""Shared memory, weights, copies, operators and process control, written in C++ (csrc/).

Paths are absolute file paths, in practice under /dev/shm. Times are seconds; leases and deadlines
run on CLOCK_MONOTONIC, the clock of time.monotonic. Errors are the classes of aegaeon.errors.
Waits release the GIL and run Python's signal handlers at least every 50 ms.
"""

from collections.abc import Iterable, Sequence
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
class ThreadPool:
    """Threads that the operators below share out their work to; each call returns when it is done.

    Calls from several threads take turns. Idle threads sleep; they end with the object.
    """

    def __init__(self, threads: int) -> None:
        """Start `threads` - 1 threads: the caller of an operator is one more."""

    @property
    def threads(self) -> int:
        """Threads that compute, the caller among them."""

# Operators take addresses of float32 rows, one after another, and write to `out`, which must not
# overlap. A row's bits depend on that row alone. Weights are (address, out_features, type): tiles
# as in aegaeon.device.packed, 64-byte aligned; type 0 is float32, 1 bfloat16, 2 float16.

def linear(
    pool: ThreadPool,
    x: int,
    shape: tuple[int, int],
    parts: tuple[tuple[int, int, int, int], ...],
    out: int,
) -> None:
    """Multiply x of `shape` (rows, in_features) with `parts`: weights and an address of biases
    (or 0) each. `out` is [rows, sum of out_features]. Raises ValueError for malformed parts."""

def embed(
    pool: ThreadPool,
    token_ids: int,
    shape: tuple[int, int],
    table: tuple[int, int, int],
    out: int,
) -> None:
    """Write the rows of `table` of int64 `token_ids` to `out` of `shape` (rows, in_features).

    Raises IndexError for an id outside the table.
    """

def rms_norm(
    pool: ThreadPool, x: int, shape: tuple[int, int], weight: int, eps: float, out: int
) -> None:
    """Norm rows x of `shape` (rows, features): x / sqrt(mean(x^2) + eps) * weight."""

def rotate(
    pool: ThreadPool,
    x: tuple[int, int],
    shape: tuple[int, int, int],
    angles: tuple[int, int],
    out: int,
) -> None:
    """Rotate half-split pairs of x, (address, row stride), of `shape` (rows, heads, head_dim).

    `angles` are the addresses of cos and sin [rows, head_dim]. Raises ValueError for odd head_dim.
    """

def silu_mul(
    pool: ThreadPool,
    gate: tuple[int, int],
    up: tuple[int, int],
    shape: tuple[int, int],
    out: int,
) -> None:
    """Write silu(gate) * up, both (address, row stride) of `shape` (rows, features)."""

@final
class PagedRows:
    """Where the rows of a pass put and find their keys and values. Does not keep the pages."""

    def __init__(
        self,
        pages: tuple[int, int],
        shape: tuple[int, int, int],
        sequences: Sequence[tuple[int, int, int, Sequence[int]]],
    ) -> None:
        """Take the arena's address and count of pages, the (layers, kv_heads, head_dim) of a token,
        and per sequence its first row, rows, first position and block ids.

        Raises ValueError for blocks outside the arena, or too few of them.
        """

def append_kv(
    pool: ThreadPool,
    rows: PagedRows,
    layer: int,
    keys: tuple[int, int],
    values: tuple[int, int],
) -> None:
    """Store keys and values, (address, row stride) each, of rows [kv_heads, head_dim].

    Raises IndexError for a layer that the pages do not have, as `attend` does.
    """

def attend(
    pool: ThreadPool,
    rows: PagedRows,
    layer: int,
    queries: tuple[int, int],
    scale: float,
    out: int,
) -> None:
    """Causal attention of queries, (address, heads), to `out`, both [rows, heads, head_dim].

    Raises ValueError where the heads are no multiple of the KV heads.
    """

def force_isa(name: str) -> None:
    """Use "baseline", "avx2", "avx512" or "best" from now on. Raises ValueError."""

def current_isa() -> str:
    """Return which of them is in use."""

@final
class CopyEngine:
    """Copies between places in memory, on threads of its own, beside everything else.

    A copy is cut into chunks; before each, the engine looks for what is most urgent. It is for all
    threads of the process that made it: in a forked child, all but `close` raises CopyError.
    """

    def __init__(
        self,
        threads: int = 1,
        chunk_bytes: int = 1 << 20,
        link_bytes_per_s: int = 0,
        is_duplex: bool = True,
    ) -> None:
        """Start `threads` (1 to 64), which sleep while there is nothing to do.

        With `link_bytes_per_s`, bytes come in at the rate of such a device link and not before,
        one chunk behind the other; if `is_duplex`, at this rate in either direction. A chunk is
        how long an urgent copy may have to wait. Raises ValueError, CopyError (no more threads).
        """

    def submit(
        self,
        segments: Sequence[tuple[int, int, int]],
        priority: int = 1,
        after: Sequence[CopyTicket] = (),
        is_outward: bool = False,
    ) -> CopyTicket:
        """Have `segments`, (to address, from address, bytes) each, copied in order.

        The memory is the caller's: it must last until the ticket is done, has failed, or `cancel`
        has returned. Priority 0 goes first, 2 last, equals in the order they were submitted; on
        several threads, neighbours overlap in time. So a copy that writes what another one reads
        or writes must name it in `after`: it starts when all of those have ended, whether done or
        not, and lends them its priority. Segments of one copy may overlap, and one may overlap
        itself if it moves to a lower address: they are then copied one after the other.

        Raises ValueError, CopyQueueFull above 4096 open tickets, CopyError when closed.
        """

    def close(self) -> None:
        """Cancel all that is open and stop the threads; memory is untouched after. Idempotent."""

    @property
    def open_tickets(self) -> int:
        """Tickets that have not ended, or wait for their turn to pass on their order."""

@final
class CopyTicket:
    """One copy. It may be dropped, and the copy is made nevertheless."""

    @property
    def is_done(self) -> bool:
        """Whether all bytes are in."""

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` or the engine's `close` came before the end."""

    @property
    def has_failed(self) -> bool:
        """Whether copying raised an error, which `failure` tells."""

    @property
    def failure(self) -> str:
        """Why it failed, or nothing."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all segments."""

    @property
    def progress_bytes(self) -> int:
        """How many bytes are in, counted through the segments without a gap; never falls."""

    @property
    def seconds(self) -> float:
        """From the first byte's start to the end, or to now; 0.0 before the start."""

    def wait(self, bytes: int | None = None, timeout_s: float = 0.0) -> bool:
        """Wait until the first `bytes`, or all, are in; say whether they are.

        False after `timeout_s`, or at once when the copy has been cancelled or has failed. Raises
        ValueError for more bytes than there are.
        """

    def cancel(self) -> None:
        """End the copy; nothing touches its memory once this returns.

        Its progress stays true. Nothing happens to a copy that has ended, and what waits for this
        one in `after` goes on: cancel that first where it makes no sense alone.
        """

    def raise_priority(self, priority: int) -> None:
        """Move it, and what it waits for, forward to `priority`; never back. Raises ValueError."""

LoadJob = tuple[str, int, int, int, int, int, int, int, int, int]

class WeightCache:
    """The weights of a node's models in shared memory: each once, loaded once, evicted by worth.

    `path` is the control region; the bytes of a model lie in a file of their own beside it,
    `path + "+" + slot + "-" + generation`. An object is one client, for the process that made it:
    not for its forks. A process may be killed at any instruction: its pins and demand are void,
    its loads are taken over or freed. The sum of the models, rounded up to pages, never exceeds
    `budget_bytes`. Every verb may raise RegionMismatch (damaged) and RegionError (closed, or a
    stopped process keeps the lock).
    """

    @staticmethod
    def open_or_create(path: str, budget_bytes: int) -> WeightCache:
        """Attach, or create where there is none; any number of processes may do so at once.

        Raises RegionError, RegionMismatch when the cache there has another budget.
        """

    def acquire(
        self, key: bytes, model: str, size_bytes: int, stages: int, timeout_s: float
    ) -> CachedModel:
        """Return the model, found by its `key` (32 bytes) or newly entered; see its `is_loader`.

        `model` is its name for people. Room is made by evicting models that nobody has pinned,
        those first whose reload costs least, by the uses to be expected, per byte. Raises
        BudgetTooSmall at once when the model is larger than the cache, and after `timeout_s`
        when too much is pinned or protected; it names who pins.
        """

    def set_demand(self, key: bytes, is_wanted: bool) -> None:
        """Say whether this process has requests for a model, which makes it dearer to evict.

        It holds for as long as the client lives, also before the model is in the cache.
        """

    def evict(self, key: bytes) -> bool:
        """Evict a model; False when it is not here, or pinned, or being loaded."""

    def status(self) -> list[CacheEntry]:
        """Return what is in the cache, in no order."""

    def evictions(self) -> list[Eviction]:
        """Return the last 128 evictions of all processes, oldest first."""

    def close(self) -> None:
        """Stop this client's loads within 100 ms and drop its demand. Idempotent.

        Pins stay with their models: close those too.
        """

    @property
    def used_bytes(self) -> int:
        """Bytes of all models, loading ones in full; at most `budget_bytes` at any instant."""

    @property
    def budget_bytes(self) -> int:
        """The bound."""

    @property
    def bytes_read(self) -> int:
        """Bytes of files that all loads, of all processes, have read."""

class CachedModel:
    """A model of the cache, mapped until this object and the last buffer of it are gone.

    The buffer claims to be writable because torch.frombuffer warns otherwise; the memory is not:
    writing ends the process with SIGSEGV. Reading is for who has a pin: the memory of an evicted
    model is taken away at once, and reading it ends the process with SIGBUS.
    """

    @property
    def is_loader(self) -> bool:
        """It is ours to load; true for one at a time among all processes."""

    @property
    def address(self) -> int:
        """Where it is mapped, on a page."""

    @property
    def size_bytes(self) -> int:
        """Its length."""

    @property
    def stages(self) -> int:
        """How many stages it is loaded in."""

    @property
    def stages_done(self) -> int:
        """Stages that are in; 0 when it has been evicted."""

    def pin(self) -> bool:
        """Keep it from being evicted; False when it has been, or its load has failed: acquire it.

        Counted, and allowed while it loads. Well under a microsecond.
        """

    def unpin(self) -> None:
        """Take one pin back. Raises RuntimeError when there is none."""

    def note_use(self) -> None:
        """Tell the cache that the model is used; acquiring it counts too."""

    def wait_stage(self, count: int, timeout_s: float) -> bool:
        """Wait until the stages [0, `count`) are in and return True.

        False after `timeout_s`, and at once when nobody loads it any more: try `take_over`. Raises
        CheckpointError with the loader's message when the load has failed, WeightsEvicted when
        the model has left the cache, ValueError for more stages than there are.
        """

    def take_over(self) -> bool:
        """Become the loader when the one before died or stopped; then `load` what is missing."""

    def populate(self) -> None:
        """Map all pages that are in, so that the first kernel need not; the loader does it too."""

    def load(self, jobs: Iterable[LoadJob], threads: int) -> None:
        """Load the missing stages with `threads` threads, each holding up to three chunks (6 MiB).

        A job is a tensor: `rows` rows of `row_bytes` at `file_offset` of `path`. Layout 0 copies
        them; 1 makes tiles, [ceil(rows/32)][columns][32] elements, missing rows zero, of elements
        of 2 or 4 bytes. `convert`: 0 none, 1 bf16 to f32, 2 f16 to f32. Destinations are multiples
        of 64, apart from each other, and in the order of stages.

        Raises ValueError for jobs that make no sense, RuntimeError when we are not its loader,
        LoadCancelled after `cancel` or a close: others may take the load over. CheckpointError
        (file missing, too short, changed, unreadable; no room in shared memory) frees the model,
        and is what all others who wait for it get.
        """

    def fail(self, message: str) -> None:
        """Free the model that is ours to load; those who wait get CheckpointError(`message`)."""

    def cancel(self) -> None:
        """Make a running `load` end with LoadCancelled within 100 ms. From any thread."""

    def close(self) -> None:
        """Let go of pins and of an unfinished load; buffers stay mapped. Idempotent."""

class CacheEntry:
    """What is known of one model in the cache."""

    model: str
    state: str  # loading, ready, freeing, failed
    size_bytes: int
    stages: int
    stages_done: int
    pin_pids: list[int]
    demand_pids: list[int]
    idle_s: float

class Eviction:
    """A model that was evicted, and why."""

    number: int  # grows by one from eviction to eviction
    model: str
    size_bytes: int
    reason: str
    time_s: float  # since the epoch
    pid: int  # who evicted it

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
