"""Keys and values of a device with memory of its own, and their copies on the host.

At a turn's end the copies begin to go out, beside the next model's compute; the device's blocks
stay as long as nobody needs their room. At a turn's start what had to leave comes in again, and a
step goes on with the sequences that are in.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

from aegaeon._native import CopyEngine, CopyTicket
from aegaeon.engine.kv_place import KvPlace, offer_blocks, take_blocks
from aegaeon.engine.sequence import Sequence
from aegaeon.errors import CopyError, OutOfBlocks
from aegaeon.memory.costs import SwapCosts
from aegaeon.memory.kv import BLOCK_TOKENS, KvPool, blocks_for
from aegaeon.memory.traffic import Traffic
from aegaeon.types import KvHandle

log = logging.getLogger(__name__)

# Before weights: a step waits for these.
URGENT = 0
# Behind everything: nobody waits for what a turn leaves behind.
IDLE = 2
COPY_S = 60.0
LOOK_S = 0.5


@dataclass(slots=True)
class _HostCopy:
    """What the host has of a sequence: its first `tokens`, once `going_out` has ended."""

    blocks: list[int] = field(default_factory=list)
    tokens: int = 0
    going_out: CopyTicket | None = None
    coming_in: CopyTicket | None = None


class SwappedKv(KvPlace):
    """`pool` is the device's, `host` the node's. Both are of the same shapes."""

    def __init__(
        self, pool: KvPool, host: KvPool, copier: CopyEngine, traffic: Traffic, costs: SwapCosts
    ) -> None:
        """Take over both pools and `copier`; `traffic` counts what the copies come to."""
        self.pool = pool
        self._host = host
        self._copier = copier
        self._traffic = traffic
        self._costs = costs
        self._copies: dict[int, _HostCopy] = {}  # by the sequence's order
        self._resting: dict[int, Sequence] = {}  # of other models, with blocks on the device

    def grow(self, sequence: Sequence) -> bool:
        missing = blocks_for(sequence.tokens) - len(sequence.blocks)
        if missing <= 0:
            return True
        if missing > self.pool.free_blocks(sequence.shape):
            self._clear_resting(sequence, missing)
        try:
            blocks = self.pool.allocate(sequence.shape, missing)
        except OutOfBlocks:
            return False
        is_away = not sequence.blocks and sequence.cached > 0
        sequence.blocks.extend(blocks)
        if is_away:
            self._bring_in(sequence)
        return True

    def give_up(self, sequence: Sequence) -> bool:
        if not sequence.blocks and sequence.cached:
            return True  # it is away already
        kv_bytes = len(sequence.blocks) * sequence.shape.block_bytes
        model = sequence.request.model
        is_worth_it = self._costs.is_worth_copying(model, sequence.cached, kv_bytes)
        if is_worth_it and self._save(sequence, URGENT) and self._is_saved(sequence, COPY_S):
            self._leave_device(sequence)
            return True
        self.free(sequence)
        return False

    def free(self, sequence: Sequence, is_poisoned: bool = False) -> None:
        copy = self._copies.pop(sequence.order, None)
        if copy is not None:
            _stop(copy)
            self._host.free(sequence.shape, copy.blocks, is_poisoned, sequence.offer)
        self.pool.free(sequence.shape, sequence.blocks, is_poisoned)
        self._resting.pop(sequence.order, None)
        sequence.forget_kv()

    def await_any(self, sequences: list[Sequence]) -> list[Sequence]:
        coming = {s.order: t for s in sequences if (t := self._coming(s)) is not None}
        if len(coming) == len(sequences) and coming:
            first = next(iter(coming.values()))
            if not first.wait(timeout_s=COPY_S):
                raise CopyError(f"keys and values did not come in ({first.failure or 'in time'})")
        return [s for s in sequences if s.order not in coming or coming[s.order].is_done]

    def begin_turn(self, own: Iterable[Sequence], others: Iterable[Sequence]) -> None:
        for sequence in others:
            if sequence.blocks:
                self._resting[sequence.order] = sequence
                self._save(sequence, IDLE)
        for sequence in own:
            self._resting.pop(sequence.order, None)
            if sequence.cached and not sequence.blocks:
                self.grow(sequence)

    def offer(self, sequence: Sequence) -> KvHandle:
        if not self._save(sequence, URGENT) or not self._is_saved(sequence, COPY_S):
            return offer_blocks(self._host, sequence, [])
        return offer_blocks(self._host, sequence, self._copies[sequence.order].blocks)

    def take(self, sequence: Sequence, kv: KvHandle) -> None:
        take_blocks(self._host, sequence.shape, kv)
        self._copies[sequence.order] = _HostCopy(list(kv.blocks), kv.cached_tokens)
        sequence.cached = kv.cached_tokens

    def close(self) -> None:
        self._copier.close()
        self._host.close()
        self.pool.close()

    # Out

    def _save(self, sequence: Sequence, priority: int) -> bool:
        """Have the host's copy brought up to date; False where it has no room for it."""
        copy = self._copies.setdefault(sequence.order, _HostCopy())
        if not sequence.blocks or copy.tokens == sequence.cached:
            if copy.going_out is not None:
                copy.going_out.raise_priority(priority)
            return True
        used = blocks_for(sequence.cached)
        missing = used - len(copy.blocks)
        try:
            copy.blocks.extend(self._host.allocate(sequence.shape, missing) if missing > 0 else ())
        except OutOfBlocks:
            return False
        # The last block that was saved may have been written to since.
        first = copy.tokens // BLOCK_TOKENS
        to, start = copy.blocks[first:used], sequence.blocks[first:used]
        segments = _segments(sequence, (self._host, to), (self.pool, start))
        after = [] if copy.going_out is None else [copy.going_out]
        copy.going_out = self._copier.submit(segments, priority, after, is_outward=True)
        copy.tokens = sequence.cached
        self._traffic.watch("kv_out", copy.going_out)
        return True

    def _is_saved(self, sequence: Sequence, patience_s: float) -> bool:
        copy = self._copies.get(sequence.order)
        if copy is None or copy.tokens != sequence.cached:
            return False
        return copy.going_out is None or copy.going_out.wait(timeout_s=patience_s)

    def _clear_resting(self, wanting: Sequence, missing: int) -> None:
        """Have other models' sequences leave the device until there is room: first those whose
        copies are on the host by now, then those that have to be waited for."""
        for patience_s in (0.0, COPY_S):
            for sequence in tuple(self._resting.values()):
                if missing <= self.pool.free_blocks(wanting.shape):
                    return
                is_urgent = patience_s > 0
                if is_urgent and not self._save(sequence, URGENT):
                    continue
                if self._is_saved(sequence, patience_s):
                    self._leave_device(sequence)

    def _leave_device(self, sequence: Sequence) -> None:
        copy = self._copies[sequence.order]
        if copy.coming_in is not None:
            copy.coming_in.cancel()
            copy.coming_in = None
        self.pool.free(sequence.shape, sequence.blocks)
        sequence.blocks = []
        self._resting.pop(sequence.order, None)

    # In

    def _bring_in(self, sequence: Sequence) -> None:
        copy = self._copies[sequence.order]
        used = blocks_for(sequence.cached)
        to, start = sequence.blocks[:used], copy.blocks[:used]
        segments = _segments(sequence, (self.pool, to), (self._host, start))
        after = [] if copy.going_out is None else [copy.going_out]
        copy.coming_in = self._copier.submit(segments, URGENT, after)
        self._traffic.watch("kv_in", copy.coming_in)

    def _coming(self, sequence: Sequence) -> CopyTicket | None:
        copy = self._copies.get(sequence.order)
        return None if copy is None else copy.coming_in


Blocks = tuple[KvPool, list[int]]


def _segments(sequence: Sequence, to: Blocks, start: Blocks) -> list[tuple[int, int, int]]:
    """Return the copies of whole blocks, one to one."""
    shape = sequence.shape
    to_address, start_address = (pool.pages(shape).data_ptr() for pool, _ in (to, start))
    return [
        (
            to_address + to_block * shape.page_bytes,
            start_address + start_block * shape.page_bytes,
            shape.block_bytes,
        )
        for to_block, start_block in zip(to[1], start[1], strict=True)
    ]


def _stop(copy: _HostCopy) -> None:
    for ticket in (copy.going_out, copy.coming_in):
        if ticket is not None:
            ticket.cancel()
