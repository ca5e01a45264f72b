"""Causal attention over paged keys and values by plain torch operators.

Keys are taken in splits of 256, combined in order by the online softmax (Milakov & Gimelshein
2018), and query rows are padded to a multiple of 4 per KV head: so a row's bits depend neither on
its batch mates, nor on padding, nor on whether it was prefilled or decoded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from aegaeon.memory.kv import BLOCK_TOKENS, KvRows, KvShape, KvView
from aegaeon.memory.workspace import PIECE_ROWS, SPLIT_TOKENS

SPLIT_BLOCKS = SPLIT_TOKENS // BLOCK_TOKENS
QUERY_TILE = 4


@dataclass(frozen=True, slots=True)
class Split:
    """One split of keys for the first `active` sequences of a group."""

    active: int
    pages: Tensor  # [2 * active * kv_heads * SPLIT_BLOCKS], for layer 0
    mask: Tensor | None  # [active, 1, query rows, SPLIT_TOKENS], 0 or -inf


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences that bring the same number of rows, longest first, computed together."""

    row_index: Tensor  # [sequences * rows]
    sequences: int
    rows: int
    splits: tuple[Split, ...]


class AttentionPlan:
    """Everything about a pass that is the same in all its layers; made once per KvView."""

    def __init__(self, kv: KvView) -> None:
        self.kv = kv
        offsets = torch.arange(2 * kv.shape.kv_heads)
        self._row_pages = kv.row_blocks[:, None] + offsets  # [rows, 2 * kv_heads]
        self._row_offsets = kv.row_offsets[:, None]
        self._groups: tuple[Group, ...] = ()

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store rows' keys and values [rows, kv_heads, head_dim]."""
        pages = self._row_pages + layer * 2 * self.kv.shape.kv_heads
        self.kv.pages[pages, self._row_offsets] = torch.cat((keys, values), dim=1)

    def attend(self, layer: int, queries: Tensor, scale: float) -> Tensor:
        """Return [rows, heads, head_dim] for queries of the same shape."""
        shape = self.kv.shape
        if not self._groups:
            per_head = queries.shape[1] // shape.kv_heads
            pieces = _pieces(self.kv.sequences)
            self._groups = tuple(_plan_group(group, shape, per_head) for group in pieces)
        result = torch.empty_like(queries)
        for group in self._groups:
            rows = queries.index_select(0, group.row_index)
            result.index_copy_(0, group.row_index, self._attend_group(layer, rows, group, scale))
        return result

    def _attend_group(self, layer: int, queries: Tensor, group: Group, scale: float) -> Tensor:
        shape = self.kv.shape
        per_head = queries.shape[1] // shape.kv_heads
        # [sequences * rows, heads, head_dim] -> [sequences * kv_heads, query rows, head_dim]
        split_heads = (group.sequences, group.rows, shape.kv_heads, per_head, shape.head_dim)
        q = queries.reshape(split_heads).permute(0, 2, 1, 3, 4)
        used = group.rows * per_head
        q = q.reshape(group.sequences * shape.kv_heads, used, shape.head_dim)
        q = F.pad(q, (0, 0, 0, -used % QUERY_TILE)).contiguous()
        o = self._attend_splits(layer, q, group.splits, scale)[:, :used]
        o = o.reshape(group.sequences, shape.kv_heads, group.rows, per_head, shape.head_dim)
        return o.permute(0, 2, 1, 3, 4).reshape(queries.shape)

    def _attend_splits(
        self, layer: int, q: Tensor, splits: Sequence[Split], scale: float
    ) -> Tensor:
        kv_heads = self.kv.shape.kv_heads
        high, total, output = self._attend_split(layer, q, splits[0], scale)
        for split in splits[1:]:
            count = split.active * kv_heads
            new = self._attend_split(layer, q[:count], split, scale)
            old_high, old_total, old_output = high[:count], total[:count], output[:count]
            both_high = torch.maximum(old_high, new[0])
            old_weight = (old_high - both_high).exp_()
            new_weight = (new[0] - both_high).exp_()
            old_total.mul_(old_weight).add_(new[1] * new_weight)
            old_output.mul_(old_weight).add_(new[2] * new_weight)
            old_high.copy_(both_high)
        return output.div_(total)

    def _attend_split(
        self, layer: int, q: Tensor, split: Split, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return maximum and sum [n, query rows, 1] and unscaled output of q over one split."""
        shape = self.kv.shape
        pages = split.pages + layer * 2 * shape.kv_heads
        held = self.kv.pages.index_select(0, pages)
        keys, values = held.view(2, len(q), SPLIT_TOKENS, shape.head_dim)
        scores = torch.bmm(q, keys.transpose(1, 2)).mul_(scale)
        if split.mask is not None:
            scores.view(split.active, shape.kv_heads, -1, SPLIT_TOKENS).add_(split.mask)
        # A row that may see nothing here still needs a finite maximum to subtract.
        high = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
        weights = scores.sub_(high).exp_()
        return high, weights.sum(-1, keepdim=True), torch.bmm(weights, values)


def _pieces(sequences: Sequence[KvRows]) -> list[list[KvRows]]:
    """Return groups of pieces: all single rows together, each piece of a prompt by itself."""
    singles: list[KvRows] = []
    groups: list[list[KvRows]] = []
    for sequence in sequences:
        done = 0
        while done < sequence.rows:
            start = sequence.start + done
            rows = min(PIECE_ROWS - start % PIECE_ROWS, sequence.rows - done)
            piece = KvRows(sequence.first_row + done, rows, start, sequence.blocks)
            if rows == 1:
                singles.append(piece)
            else:
                groups.append([piece])
            done += rows
    if singles:
        singles.sort(key=lambda piece: -piece.tokens)
        groups.append(singles)
    return groups


def _plan_group(pieces: list[KvRows], shape: KvShape, per_head: int) -> Group:
    rows = pieces[0].rows
    index = torch.tensor([piece.first_row for piece in pieces])[:, None] + torch.arange(rows)
    splits = []
    for first in range(0, pieces[0].tokens, SPLIT_TOKENS):
        active = [piece for piece in pieces if piece.tokens > first]
        splits.append(_plan_split(active, first, shape, per_head))
    return Group(index.reshape(-1), len(pieces), rows, tuple(splits))


def _plan_split(pieces: list[KvRows], first: int, shape: KvShape, per_head: int) -> Split:
    first_block = first // BLOCK_TOKENS
    tables = []
    for piece in pieces:
        used = -(-piece.tokens // BLOCK_TOKENS)
        blocks = piece.blocks[first_block : min(first_block + SPLIT_BLOCKS, used)]
        # Masked, but read: its own first block, so that a sequence only ever reads itself.
        tables.append(blocks + (piece.blocks[0],) * (SPLIT_BLOCKS - len(blocks)))
    heads = torch.arange(2 * shape.kv_heads).view(2, 1, shape.kv_heads, 1)
    pages = torch.tensor(tables)[None, :, None, :] + heads
    return Split(len(pieces), pages.reshape(-1), _mask(pieces, first, per_head))


def _mask(pieces: list[KvRows], first: int, per_head: int) -> Tensor | None:
    if all(piece.start >= first + SPLIT_TOKENS - 1 for piece in pieces):
        return None
    rows = pieces[0].rows
    # Padding rows see what the sequence's last row sees; nobody reads their results.
    row_of = torch.arange(rows * per_head + -(rows * per_head) % QUERY_TILE) // per_head
    positions = torch.tensor([piece.start for piece in pieces])[:, None] + row_of
    keys = torch.arange(first, first + SPLIT_TOKENS)
    hidden = keys > positions[:, None, :, None]
    return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
