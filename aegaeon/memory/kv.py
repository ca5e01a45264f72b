"""Keys and values: one arena per instance, cut into slabs, slabs into blocks of 16 tokens.

Bookkeeping is plain Python and O(1) per block; tensors over the arena are made per block shape.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aegaeon.errors import BudgetTooSmall, OutOfBlocks

BLOCK_TOKENS = 16
SLAB_TARGET_BYTES = 4 << 20
ALIGNMENT_BYTES = 64
MAX_SLAB_CANDIDATES = 512


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


@dataclass(frozen=True, slots=True)
class KvRows:
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
    """What a device needs of the KV in one forward pass: pages, where rows go, what they read.

    A page is one head's keys or values of 16 tokens in one layer. Block id b of shape s owns the
    pages b .. b + s.block_pages - 1 of `pages`.
    """

    def __init__(self, shape: KvShape, pages: Tensor, sequences: Sequence[KvRows]) -> None:
        self.shape = shape
        self.pages = pages  # [pages, block_tokens, head_dim]
        self.sequences = tuple(sequences)
        blocks: list[int] = []
        offsets: list[int] = []
        for rows in self.sequences:
            for position in range(rows.start, rows.tokens):
                blocks.append(rows.blocks[position // BLOCK_TOKENS])
                offsets.append(position % BLOCK_TOKENS)
        self.row_blocks = torch.tensor(blocks, dtype=torch.int64)  # [rows]
        self.row_offsets = torch.tensor(offsets, dtype=torch.int64)  # [rows]


class _Slab:
    """A slab bound to a shape: the blocks of it that are free."""

    __slots__ = ("blocks", "free", "index")

    def __init__(self, index: int, blocks: list[int]) -> None:
        self.index = index
        self.blocks = len(blocks)
        self.free = blocks


class KvPool:
    """The arena of one instance, at most `budget_bytes`. Callers serialise its verbs.

    A slab belongs to one shape at a time and is anybody's again when all its blocks are free.
    Blocks are named by their first page in the arena, so an id means something with its shape only.
    Raises BudgetTooSmall when one block of every shape does not fit.
    """

    def __init__(self, budget_bytes: int, shapes: Iterable[KvShape]) -> None:
        self._shapes = tuple(dict.fromkeys(shapes))
        self.slab_bytes = choose_slab_bytes(budget_bytes, self._shapes)
        self.slab_count = budget_bytes // self.slab_bytes
        if self.slab_count < 1:
            raise BudgetTooSmall(
                f"a KV budget of {budget_bytes} bytes holds no slab of {self.slab_bytes} bytes; "
                "raise --kv-budget-gb"
            )
        self.budget_bytes = budget_bytes
        self._arena = torch.empty(self.slab_count * self.slab_bytes, dtype=torch.uint8)
        self._free_slabs = list(range(self.slab_count - 1, -1, -1))
        self._partial: dict[KvShape, dict[int, _Slab]] = {shape: {} for shape in self._shapes}
        self._bound: dict[int, _Slab] = {}
        self._free_blocks = dict.fromkeys(self._shapes, 0)
        self._used_bytes = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks given out."""
        return self._used_bytes

    @property
    def identity(self) -> int:
        """Whose blocks these are, in a KvHandle; nobody else can reach those of this pool."""
        return 0

    def take(self, shape: KvShape, blocks: Iterable[int], sender: int) -> bool:  # noqa: ARG002
        """Make `blocks` of `sender` ours, all or none; say whether they are. Never, here: the arena
        is this instance's alone."""
        return False

    def slab_blocks(self, shape: KvShape) -> int:
        """Blocks of `shape` in a slab."""
        return self.slab_bytes // shape.block_bytes

    def capacity_blocks(self, shape: KvShape) -> int:
        """Blocks of `shape` when nothing else is in the arena."""
        return self.slab_count * self.slab_blocks(shape)

    def free_blocks(self, shape: KvShape) -> int:
        """Blocks of `shape` that could be allocated now."""
        return self._free_blocks[shape] + len(self._free_slabs) * self.slab_blocks(shape)

    def allocate(self, shape: KvShape, count: int) -> list[int]:
        """Return `count` block ids, or raise OutOfBlocks and give none. The blocks are zeroed.

        What an earlier owner left (a NaN at worst) would reach a reader through masked keys.
        """
        free = self.free_blocks(shape)
        if count > free:
            raise OutOfBlocks(
                f"need {count} KV blocks of {shape.block_bytes} bytes, {free} of "
                f"{self.capacity_blocks(shape)} are free; raise --kv-budget-gb or lower --max-batch"
            )
        partial = self._partial[shape]
        taken: list[int] = []
        while len(taken) < count:
            slab = next(iter(partial.values())) if partial else self._bind(shape)
            give = min(count - len(taken), len(slab.free))
            taken.extend(slab.free[-give:])
            del slab.free[-give:]
            if not slab.free:
                del partial[slab.index]
        self._free_blocks[shape] -= count
        self._used_bytes += count * shape.block_bytes
        pages = self.pages(shape)
        for block in taken:
            pages[block : block + shape.block_pages] = 0
        return taken

    def free(self, shape: KvShape, blocks: Iterable[int]) -> None:
        """Give back blocks that `allocate` returned for `shape`; contents are lost."""
        partial = self._partial[shape]
        for block in blocks:
            slab = self._bound[block * shape.page_bytes // self.slab_bytes]
            slab.free.append(block)
            self._used_bytes -= shape.block_bytes
            self._free_blocks[shape] += 1
            partial[slab.index] = slab
            if len(slab.free) == slab.blocks:
                del partial[slab.index]
                del self._bound[slab.index]
                self._free_blocks[shape] -= slab.blocks
                self._free_slabs.append(slab.index)

    def pages(self, shape: KvShape) -> Tensor:
        """Return the arena as pages of `shape`: [pages, block_tokens, head_dim]."""
        return self._arena.view(shape.dtype).view(-1, BLOCK_TOKENS, shape.head_dim)

    def view(self, shape: KvShape, sequences: Sequence[KvRows]) -> KvView:
        """Return what a device needs to run `sequences`."""
        return KvView(shape, self.pages(shape), sequences)

    def _bind(self, shape: KvShape) -> _Slab:
        index = self._free_slabs.pop()
        first = index * self.slab_bytes // shape.page_bytes
        count = self.slab_blocks(shape)
        slab = _Slab(index, [first + i * shape.block_pages for i in range(count - 1, -1, -1)])
        self._bound[index] = slab
        self._partial[shape][index] = slab
        self._free_blocks[shape] += count
        return slab


def choose_slab_bytes(budget_bytes: int, shapes: Sequence[KvShape]) -> int:
    """Return a slab size that holds whole pages of every shape and wastes the least.

    Slabs hold at least one block of every shape; they are about 4 MiB, less in a small budget so
    that several models find one.
    """
    if not shapes:
        return ALIGNMENT_BYTES
    unit = math.lcm(ALIGNMENT_BYTES, *(shape.page_bytes for shape in shapes))
    largest = max(shape.block_bytes for shape in shapes)
    target = min(SLAB_TARGET_BYTES, budget_bytes // (4 * len(shapes)))
    smallest_units = -(-largest // unit)
    largest_units = max(smallest_units, 2 * target // unit)
    step = max(1, (largest_units - smallest_units) // MAX_SLAB_CANDIDATES)
    candidates = range(smallest_units, largest_units + 1, step)

    def waste(units: int) -> float:
        slab = units * unit
        return max(slab % shape.block_bytes / slab for shape in shapes)

    # The first of the least wasteful, in steps of 1/64, so that a slab is not huge for nothing.
    return unit * min(candidates, key=lambda units: (round(64 * waste(units)), units))


def blocks_for(tokens: int) -> int:
    """Return how many blocks hold `tokens`."""
    return -(-tokens // BLOCK_TOKENS)
