"""Keys and values: one arena per node, cut into slabs, slabs into blocks of 16 tokens.

Who holds which block is native and in shared memory (csrc/memory); here are shapes and tensors.
"""

import logging
import math
import threading
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from aegaeon import _native
from aegaeon.errors import BudgetTooSmall, OutOfBlocks
from aegaeon.memory.area import Area, Locks

BLOCK_TOKENS = 16
SLAB_TARGET_BYTES = 4 << 20
ALIGNMENT_BYTES = 64
MAX_SLAB_CANDIDATES = 512
LEAST_SLABS = 32  # are left, however large the blocks of models that may come
MAX_SPARE = 64  # shapes of models that may come
# Between two slabs that are backed ahead of their first use, about twice what one takes.
BACKING_PAUSE_S = 0.003

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KvShape:
    """What one token keeps: `layers` x (key, value) x `kv_heads` x `head_dim` of `dtype`."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.float32

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """Bytes of a block of 16 tokens over all layers."""
        return self.token_bytes * BLOCK_TOKENS

    @property
    def page_bytes(self) -> int:
        """Bytes of a page: one head's keys or values of a block's 16 tokens in one layer."""
        return BLOCK_TOKENS * self.head_dim * self.dtype.itemsize

    @property
    def block_pages(self) -> int:
        """Pages of a block, ordered [layer, key or value, kv_head]."""
        return self.layers * 2 * self.kv_heads


class KvRows(msgspec.Struct, frozen=True):
    """The rows of one sequence in a forward pass: `rows` of them, from row `first_row` on.

    The first has position `start`; `blocks` are the sequence's block ids, in token order, enough
    for start + rows tokens.
    """

    first_row: int
    rows: int
    start: int
    blocks: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the sequence once this pass has appended its rows."""
        return self.start + self.rows


class KvView:
    """What a device needs of the KV in one forward pass: pages, and the rows of each sequence.

    A page is one head's keys or values of 16 tokens in one layer. Block id b of shape s owns the
    pages b .. b + s.block_pages - 1 of `pages`.
    """

    def __init__(self, shape: KvShape, pages: Tensor, sequences: Sequence[KvRows]) -> None:
        self.shape = shape
        self.pages = pages  # [pages, block_tokens, head_dim]
        self.sequences = tuple(sequences)


class KvPool:
    """One client of the blocks in an arena, which all clients that name the same `path` share.

    The arena, `budget_bytes` of it, is cut into slabs that serve one block shape at a time. A block
    is named by its first page in the arena, the same in every process, so an id means something
    with its shape only. Any thread may call any verb; other processes' clients hold, hand on and
    free blocks at the same time. What a dead process held comes back by itself, zeroed.

    Blocks are not zeroed when they are given out: a device may read masked keys and values all the
    same, which count for nothing as long as they are finite. So whoever may have left something
    else says so when it frees them.
    """

    def __init__(
        self,
        budget_bytes: int,
        shapes: Iterable[KvShape],
        path: str | None = None,
        quota_bytes: int | None = None,
        area: Area | None = None,
        spare: Iterable[KvShape] = (),
    ) -> None:
        """Join the pool at `path`, making it where there is none; without a path it is our own.

        This client holds `quota_bytes` at most (default: all). A private arena may lie in an
        `area` of the caller's: zeroed, of budget_bytes. Slabs are cut for `shapes`; they serve
        those of `spare`, too, of which a block fits.
        Raises BudgetTooSmall when one block of every shape does not fit, RegionMismatch when the
        pool there has other sizes or is damaged, RegionError when it cannot be made or joined.
        """
        self.slab_bytes, ordered = cut_slabs(budget_bytes, shapes, spare)
        self._numbers = {shape: number for number, shape in enumerate(ordered)}
        self.slab_count = _count_slabs(budget_bytes, self.slab_bytes)
        self.budget_bytes = budget_bytes if quota_bytes is None else quota_bytes
        slabs = (self.slab_bytes, self.slab_count)
        records = [_shape_record(shape) for shape in ordered]
        self.name = path or ""  # where others find it; nobody finds a private one
        if path is not None:
            self._native = _native.KvPool.open_shared(path, slabs, records, self.budget_bytes)
        else:
            at = () if area is None else (area.address, area.owner)
            self._native = _native.KvPool.open_private(slabs, records, self.budget_bytes, *at)
        self._arena = torch.frombuffer(self._native, dtype=torch.uint8)
        if area is not None:
            self._arena = area.part(0, len(self._arena))
        self._locks: Locks | None = None  # of those who have locked it
        self._pages: dict[KvShape, Tensor] = {}  # views of it, made at their first use
        self._backing: threading.Thread | None = None
        self._is_wanted = threading.Event()
        self._slab_searches = 0
        self._is_closing = False

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks that this client holds: looks at every block there is."""
        return self._native.used_bytes

    @property
    def evicted_blocks(self) -> int:
        """How many blocks that rested, of whomever, made room for ours since the start."""
        return self._native.evicted

    @property
    def charged_bytes(self) -> int:
        """Bytes that count against our quota: what we hold, and what others have taken from us
        under an offer that we have not let go."""
        return self._native.charged_bytes

    def knows(self, shape: KvShape) -> bool:
        """Whether slabs may hold blocks of `shape`."""
        return shape in self._numbers

    def slab_blocks(self, shape: KvShape) -> int:
        """Blocks of `shape` in a slab."""
        return _blocks_in(self.slab_bytes, shape)

    def capacity_blocks(self, shape: KvShape) -> int:
        """Blocks of `shape` that this client may hold when nothing else is in the arena."""
        most = self._native.quota_bytes // shape.block_bytes
        return min(self.slab_count * self.slab_blocks(shape), most)

    def free_blocks(self, shape: KvShape) -> int:
        """Blocks of `shape` that could be allocated now; others may be quicker."""
        return self._native.free_blocks(self._numbers[shape])

    def allocate(self, shape: KvShape, count: int) -> list[int]:
        """Return `count` block ids, or raise OutOfBlocks and give none.

        What is in them was left by others; it is finite numbers of the shape's dtype.
        """
        blocks = self._native.allocate(self._numbers[shape], count)
        if self._native.slab_searches != self._slab_searches:
            self._slab_searches = self._native.slab_searches
            self._is_wanted.set()
        return blocks

    def free(
        self, shape: KvShape, blocks: Sequence[int], is_poisoned: bool = False, offer: int = 0
    ) -> None:
        """Give back those of `blocks` that are ours; those that others have taken are skipped.

        `is_poisoned`: there may be infinities or NaN in them, so they are zeroed. `offer`: only
        those that still lie under it; so is let go what was offered, for a block may have been
        taken, freed and given to us again for something else.
        """
        self._native.free(self._numbers[shape], blocks, is_poisoned, offer)

    def rest(self, shape: KvShape, blocks: Sequence[int], offer: int = 0) -> list[int]:
        """Free those of `blocks` that are ours, as `free` would, and leave what is in them as long
        as nobody needs their room: the later in the list, the longer.

        Whoever allocates, in any process, takes of what rests when nothing is free; it counts as
        free everywhere, and against no quota. Returns the word to wake each by (0: not ours).
        """
        return self._native.rest(self._numbers[shape], blocks, offer)

    def wake(self, shape: KvShape, blocks: Sequence[int], words: Sequence[int]) -> int:
        """Make resting blocks ours, whoever laid them down, with what was in them; return how many
        of them, the first ones: up to one that has been evicted, or that we have no quota for."""
        return self._native.wake(self._numbers[shape], blocks, words)

    def still_rest(self, shape: KvShape, blocks: Sequence[int], words: Sequence[int]) -> list[bool]:
        """Return which of the blocks hold what they did when `rest` gave these words."""
        return self._native.still_rest(self._numbers[shape], blocks, words)

    @property
    def is_shared(self) -> bool:
        """Whether others may be clients of it."""
        return bool(self.name)

    def tell(
        self, shape: KvShape, keys: Sequence[bytes], blocks: Sequence[int], words: Sequence[int]
    ) -> None:
        """Let all clients find blocks that rest under `words` by `keys`, hashes of what they hold.
        What rests by the same key already is freed."""
        self._native.tell(self._numbers[shape], keys, blocks, words)

    def look_up(self, shape: KvShape, keys: Sequence[bytes]) -> list[tuple[int, int]]:
        """Return for each key a block that rests by it, whoever told of it, and its word (0: there
        is none)."""
        return self._native.look_up(self._numbers[shape], keys)

    def copy(self, shape: KvShape, to: int, start: int) -> None:
        """Copy all of block `start` to block `to`, in memory of this host: where its tokens lie in
        a page is the device's business."""
        pages, count = self.pages(shape), shape.block_pages
        with torch.inference_mode():  # in which a step may have made the view
            pages[to : to + count] = pages[start : start + count]

    def offer(self, shape: KvShape, blocks: Sequence[int]) -> int | None:
        """Return an identity by which a receiver may take these blocks of ours, all at once.

        They stay ours until taken; freeing one, or offering it anew, makes the offer void. (Our own
        identity would still fit a block that we freed and allocated for something else.) None when
        a block is not ours any more.
        """
        return self._native.offer(self._numbers[shape], blocks)

    def take(self, shape: KvShape, blocks: Sequence[int], sender: int) -> bool:
        """Make `blocks` ours, if all of them are `sender`'s: an offer's identity.

        False: at least one is not, and none has changed hands. Raises OutOfBlocks when we may not
        hold so much.
        """
        return self._native.take(self._numbers[shape], blocks, sender)

    def back_ahead(self, ahead_bytes: int) -> None:
        """From now on keep so much memory ready in slabs that nobody has used yet: whoever is the
        first to write there would wait for the system (measured: 0.3 s/GB)."""
        self._is_wanted.set()
        self._backing = threading.Thread(
            target=self._back, args=(ahead_bytes,), name="kv backing", daemon=True
        )
        self._backing.start()

    def pin(self, locks: Locks) -> bool:
        """Page-lock the arena until `close`, so that a device copies to and from there at full
        speed; say whether that was done. It takes all of its memory, 0.3 s/GB of what is new.

        All of it, whatever our quota: quotas say how many blocks a client holds, not which, and
        what another one hands over lies where that one had it. The pages are the same for all who
        lock them, so that memory is taken once.
        """
        place = self._arena.data_ptr(), len(self._arena)
        if locks.lock("the node's keys and values", place):
            self._locks = locks
        return self._locks is not None

    def close(self) -> None:
        """Free all that we hold and leave the pool; idempotent. Views stay readable."""
        if self._locks is not None:
            self._locks.unlock(self._arena.data_ptr())
            self._locks = None
        self._is_closing = True
        self._is_wanted.set()
        if self._backing is not None:
            self._backing.join()
        self._native.close()

    def pages(self, shape: KvShape) -> Tensor:
        """Return the arena as pages of `shape`: [pages, block_tokens, head_dim]."""
        pages = self._pages.get(shape)
        if pages is None:
            whole = len(self._arena) // shape.page_bytes * shape.page_bytes
            pages = self._arena[:whole].view(shape.dtype).view(-1, BLOCK_TOKENS, shape.head_dim)
            self._pages[shape] = pages
        return pages

    def bytes_of(self, shape: KvShape, blocks: Sequence[int]) -> list[memoryview]:
        """Return the bytes of `blocks` in order; of those that lie side by side as one."""
        whole, views, start = memoryview(self._native), list[memoryview](), 0
        for at, block in enumerate(blocks, 1):
            if at == len(blocks) or blocks[at] != block + shape.block_pages:
                first = blocks[start] * shape.page_bytes
                views.append(whole[first : first + (at - start) * shape.block_bytes])
                start = at
        return views

    def view(self, shape: KvShape, sequences: Sequence[KvRows]) -> KvView:
        """Return what a device needs to run `sequences`."""
        return KvView(shape, self.pages(shape), sequences)

    def _back(self, ahead_bytes: int) -> None:
        while True:
            self._is_wanted.wait()
            self._is_wanted.clear()
            try:
                while not self._is_closing and self._native.back_next(ahead_bytes):
                    time.sleep(BACKING_PAUSE_S)
            except OutOfBlocks as error:
                # Tried again with the next slab; who needs it before is told the same.
                log.warning("%s", error)
            if self._is_closing:
                return


def _count_slabs(budget_bytes: int, slab_bytes: int) -> int:
    if budget_bytes < slab_bytes:
        raise BudgetTooSmall(
            f"a KV budget of {budget_bytes} bytes holds no slab of {slab_bytes} bytes; "
            "raise --kv-budget-gb"
        )
    return budget_bytes // slab_bytes


def _shape_record(shape: KvShape) -> tuple[int, int, int]:
    """Return what the native pool knows of a shape: its sizes, and a number for its dtype."""
    return shape.block_bytes, shape.page_bytes, zlib.crc32(str(shape.dtype).encode())


def _blocks_in(slab_bytes: int, shape: KvShape) -> int:
    # Where slabs are not whole pages, up to a page is lost before a slab's first one.
    lost = shape.page_bytes if slab_bytes % shape.page_bytes else 0
    return (slab_bytes - lost) // shape.block_bytes


def choose_slab_bytes(budget_bytes: int, shapes: Sequence[KvShape]) -> int:
    """Return a slab size that wastes the least: of whole pages of every shape, where that is not
    huge for the sake of one odd head_dim.

    Slabs hold at least one block of every shape; they are about 4 MiB, less in a small budget so
    that several models find one.
    """
    unit = math.lcm(ALIGNMENT_BYTES, *(shape.page_bytes for shape in shapes))
    largest = max(shape.block_bytes for shape in shapes)
    target = min(SLAB_TARGET_BYTES, budget_bytes // (4 * len(shapes)))
    if unit > max(target, largest):
        unit = ALIGNMENT_BYTES
        largest = max(shape.block_bytes + shape.page_bytes for shape in shapes)
    smallest_units = -(-largest // unit)
    largest_units = max(smallest_units, 2 * target // unit)
    step = max(1, (largest_units - smallest_units) // MAX_SLAB_CANDIDATES)
    candidates = range(smallest_units, largest_units + 1, step)

    def waste(units: int) -> float:
        slab = units * unit
        return max(1 - _blocks_in(slab, shape) * shape.block_bytes / slab for shape in shapes)

    # The first of the least wasteful, in steps of 1/64, so that a slab is not huge for nothing.
    return unit * min(candidates, key=lambda units: (round(64 * waste(units)), units))


def cut_slabs(
    budget_bytes: int, shapes: Iterable[KvShape], spare: Iterable[KvShape]
) -> tuple[int, list[KvShape]]:
    """Return the size of a slab for `shapes`, and all that it serves, those of `spare` last of
    which a block fits: the same for the same arguments, in whatever order."""
    ordered = sorted(set(shapes), key=_shape_record)
    more = sorted(set(spare) - set(ordered), key=_shape_record)
    slab_bytes = widen_slab(choose_slab_bytes(budget_bytes, ordered), budget_bytes, more)
    fitting = [shape for shape in more if _blocks_in(slab_bytes, shape) > 0]
    return slab_bytes, ordered + fitting[:MAX_SPARE]


def widen_slab(slab_bytes: int, budget_bytes: int, spare: Iterable[KvShape]) -> int:
    """Return a multiple of `slab_bytes`, which suits other shapes, that holds a block of each of
    `spare`, too; but of none so large that few slabs would be left."""
    needs = (shape.block_bytes + shape.page_bytes for shape in spare)
    able = (need for need in needs if need <= budget_bytes // LEAST_SLABS)
    return slab_bytes * -(-max(able, default=1) // slab_bytes)


def blocks_for(tokens: int) -> int:
    """Return how many blocks hold `tokens`."""
    return -(-tokens // BLOCK_TOKENS)
