"""The node's weight cache and KV pool (csrc/memory)."""

from collections.abc import Iterable, Sequence
from typing import final

# (path, bytes, mtime_ns, inode)
PlannedFile = tuple[str, int, int, int]
LoadJob = tuple[PlannedFile, int, int, int, int, int, int, int, int, int]

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

        It holds for as long as the client lives, also before the model is in the cache. Waits for
        no other process, as does `used_bytes`.
        """

    def evict(self, key: bytes) -> bool:
        """Evict a model; False when it is not here, or pinned, or being loaded."""

    def prepare(self, size_bytes: int) -> bool:
        """Make memory ready for a model to come, as far as the budget has room for it.

        Finding the pages takes longer than a fast disk takes to fill them: so it is done ahead,
        in huge pages where the system has them; about a second for each GB.
        The next model that is entered gets it. Returns at once when there is nothing to do or
        another process is at it, and soon after `close`. False where shared memory is too full to
        go on: a part of it is left to others, and all is given up when they come to need it.
        """

    def status(self) -> list[CacheEntry]:
        """Return what is in the cache, in no order."""

    def evictions(self) -> list[Eviction]:
        """Return the last 127 evictions of all processes, oldest first."""

    def close(self) -> None:
        """Stop this client's loads within 100 ms and drop its demand. Idempotent.

        Pins stay with their models: close those too.
        """

    @property
    def used_bytes(self) -> int:
        """Bytes of all models, loading ones in full; at most `budget_bytes` at any instant."""

    @property
    def spare_bytes(self) -> int:
        """Bytes kept beside the models for the next one; with them at most `budget_bytes`."""

    @property
    def ready_bytes(self) -> int:
        """How many of them are ready by now."""

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
    model is taken away at once, and reading it ends the process with SIGBUS, or finds what another
    model has there by now.
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

    def gather(self, offset: int) -> bool:
        """Have the 2 MiB from `offset` on, a multiple of as much, moved into one huge page.

        For a model that is in; others may read it meanwhile. False where the system does not, or
        the model is gone. Raises ValueError for what is not a whole huge page of the model.
        """

    def load(self, jobs: Iterable[LoadJob], threads: int) -> None:
        """Load the missing stages with `threads` threads, each holding 4 MiB and a little.

        A job is a tensor: `rows` rows of `row_bytes` at `file_offset` of a file. Layout 0 copies
        them; 1 makes tiles, [ceil(rows/32)][columns][32] elements, missing rows zero, of elements
        of 2 or 4 bytes; 2 makes int8 tiles (csrc/ops/ops.h) of what is f32, or becomes it.
        `convert`: 0 none, 1 bf16 to f32, 2 f16 to f32. Destinations are multiples of 64, apart from
        each other, and in the order of stages.

        Raises RuntimeError when we are not its loader, LoadCancelled after `cancel` or a close:
        others may take the load over. CheckpointError (file missing, changed since it was planned,
        unreadable, or with infinity or NaN for int8; jobs that make no sense; no room in shared
        memory) frees the model, and is what all others who wait for it get.
        """

    def cancel(self) -> None:
        """Make a running `load` end with LoadCancelled within 100 ms, and any later one at once.

        From any thread.
        """

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

class DeviceBytes:
    """Memory that a device, and not this processor, reads and writes."""

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
        device: DeviceBytes | None = None,
    ) -> KvPool:
        """Make a pool of (slab bytes, slab count) in memory of our own, or zeroed at `address`;
        with `device`, that address is in its memory, which the pool keeps."""

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

        Waits, 2 s at most for all of them, where another client is in the middle of taking one.
        """

    def offer(self, shape: int, blocks: Sequence[int]) -> int | None:
        """Return an identity, good for one `take` of these; None when one is not ours any more."""

    def take(self, shape: int, blocks: Sequence[int], sender: int) -> bool:
        """Make all of them ours if all are the sender's. Raises OutOfBlocks over the quota."""

    def rest(self, shape: int, blocks: Sequence[int], offer: int = 0) -> list[int]:
        """Free those that are ours (and still under `offer`), and leave what is in them while
        nobody needs the room, the later ones longer; return the words to wake them by (0: not
        ours)."""

    def wake(self, shape: int, blocks: Sequence[int], words: Sequence[int]) -> int:
        """Make the first of these ours, whoever laid them to rest, up to one that is gone or over
        the quota; return how many."""

    def still_rest(self, shape: int, blocks: Sequence[int], words: Sequence[int]) -> list[bool]:
        """Return which of these have not been evicted, nor woken."""

    def tell(
        self, shape: int, keys: Sequence[bytes], blocks: Sequence[int], words: Sequence[int]
    ) -> None:
        """Let all clients find these, which rest under `words` (0: it does not), by `keys`, of 16
        bytes each: hashes of what they hold. Others that rest by the same key are freed."""

    def look_up(self, shape: int, keys: Sequence[bytes]) -> list[tuple[int, int]]:
        """Return for each key a block that rests by it, and the word to wake it by (0: none)."""

    def back_next(self, ahead_bytes: int) -> bool:
        """Get memory for one more free slab, unless free slabs of `ahead_bytes` have some; say
        whether that was done. Raises OutOfBlocks when shared memory is full."""

    @property
    def slab_searches(self) -> int:
        """How often `allocate` wanted a slab that was not in use."""

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
        """Bytes of the blocks that we hold, not of those that rest: looks at every block."""

    @property
    def charged_bytes(self) -> int:
        """What counts against the quota: what others have taken too, until its offer is freed."""

    @property
    def evicted(self) -> int:
        """How many resting blocks, of whomever, made room for us."""

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

def quantize_tiles(source: int, shape: tuple[int, int], convert: int, out: int) -> None:
    """Round a matrix of `shape` (rows, columns) at the address `source` to int8 tiles at `out`, as
    a load does (csrc/memory/quantize.h). `convert`: 0 it is f32, 1 bf16, 2 f16.

    Raises ValueError for infinity and NaN.
    """
