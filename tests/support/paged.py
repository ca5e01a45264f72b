"""A KV pool with sequences in it, for tests of what reads and writes pages."""

from collections.abc import Callable, Sequence

import torch

from aegaeon.device.base import StepBatch
from aegaeon.memory.area import Area
from aegaeon.memory.kv import KvPool, KvRows, KvShape, blocks_for


class PagedSequences:
    """Sequences of one shape in a pool of their own; blocks are handed out shuffled."""

    def __init__(
        self,
        shape: KvShape,
        lengths: Sequence[int],
        seed: int = 0,
        area: Callable[[int], Area] | None = None,
    ) -> None:
        """`area` gives so many bytes for the pool to lie in, where that is not this host's."""
        counts = [blocks_for(length) for length in lengths]
        self.shape = shape
        budget_bytes = 64 * shape.block_bytes * (sum(counts) + 1)
        self.pool = KvPool(budget_bytes, (shape,), area=area and area(budget_bytes))
        blocks = self.pool.allocate(shape, sum(counts))
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed)).tolist()
        shuffled = iter([blocks[i] for i in order])
        self.blocks = [tuple(next(shuffled) for _ in range(count)) for count in counts]

    def batch(self, parts: list[tuple[int, int, int]]) -> StepBatch:
        """Return a pass with, for each (sequence, start, rows), those positions of it."""
        rows = []
        first = 0
        for sequence, start, count in parts:
            rows.append(KvRows(first, count, start, self.blocks[sequence]))
            first += count
        positions = [p for _, start, count in parts for p in range(start, start + count)]
        return StepBatch(
            token_ids=torch.zeros(first, dtype=torch.int64),
            positions=torch.tensor(positions),
            logit_rows=torch.zeros(0, dtype=torch.int64),
            kv=self.pool.view(self.shape, rows),
        )
