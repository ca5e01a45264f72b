"""Keys and values of a device with memory of its own, and their copies on the host.

At a turn's end the copies begin to go out, beside the next model's compute; the device's blocks
stay as long as nobody needs their room. At a turn's start what had to leave comes in again, and a
step goes on with the sequences that are in.

Both pools keep what sequences begin with, once they have ended: see memory/prefixes.py. A sequence
begins with what the device has, and goes on with what the host has beyond that, whichever instance
left it there.
"""

import logging
from collections.abc import Iterable

from aegaeon._native import CopyEngine, CopyTicket
from aegaeon.engine.kv_copies import Blocks, HostCopy, segments_of
from aegaeon.engine.kv_lending import Lending
from aegaeon.engine.kv_place import KvPlace, offer_blocks, recall_blocks, take_blocks
from aegaeon.engine.kv_return import Return
from aegaeon.engine.kv_spill import Spill
from aegaeon.engine.sequence import Sequence
from aegaeon.errors import CopyError, CopyQueueFull, OutOfBlocks
from aegaeon.memory.costs import SwapCosts
from aegaeon.memory.kv import BLOCK_TOKENS, KvPool, blocks_for
from aegaeon.memory.prefixes import Held, Prefixes
from aegaeon.memory.traffic import Traffic
from aegaeon.types import KvHandle

log = logging.getLogger(__name__)

# Before weights: a step waits for these.
URGENT = 0
# Behind everything: nobody waits for what a turn leaves behind.
IDLE = 2
COPY_S = 60.0


class SwappedKv(KvPlace):
    """`pool` is the device's, `host` the node's. Both are of the same shapes."""

    def __init__(
        self,
        pools: tuple[KvPool, KvPool],
        copier: CopyEngine,
        traffic: Traffic,
        costs: SwapCosts,
        is_sharing: bool = False,
        lending: Lending | None = None,
    ) -> None:
        """Take over the `pools` of device and host, `copier`, and `lending`, by which KV goes to
        other processes on the device; `traffic` counts what the copies come to."""
        pool, host = pools
        super().__init__(pool, is_sharing)
        self._host = host
        self._kept = Prefixes(host, is_sharing)
        self._spill = Spill(self.prefixes, self._kept, copier, traffic)
        self._return = Return(self._spill, self.lock)
        self._copier = copier
        self._traffic = traffic
        self._costs = costs
        self._lending = lending
        self._copies: dict[int, HostCopy] = {}  # by the sequence's order
        self._resting: dict[int, Sequence] = {}  # of other models, with blocks on the device

    def grow(self, sequence: Sequence) -> bool:
        return self._grow(sequence, is_patient=True)

    def known_tokens(self, sequence: Sequence) -> int:
        if sequence.cached or not sequence.is_shareable:
            return sequence.cached
        chain, most = sequence.chain, sequence.findable_tokens // BLOCK_TOKENS
        here = self.prefixes.knows(sequence.shape, chain, most)
        more = self._more_on_host(sequence, here, most)
        return (here + more) * BLOCK_TOKENS

    def give_up(self, sequence: Sequence) -> bool:
        if not sequence.blocks and sequence.cached:
            return True  # it is away already
        if self._is_worth_keeping(sequence) and self._is_saved_in_time(sequence):
            self._leave_device(sequence)
            return True
        self.free(sequence)
        return False

    def free(self, sequence: Sequence, is_poisoned: bool = False) -> None:
        if self._lending is not None:
            self._lending.take_back(sequence)
        shape, chain = sequence.shape, sequence.chain
        is_poisoned = is_poisoned or sequence.is_unsure
        copy = self._copies.pop(sequence.order, None)
        if copy is not None:
            copy.settle(shape.block_bytes)
            copy.stop()
            whole = min(sequence.whole_blocks, copy.tokens // BLOCK_TOKENS)
            if not (is_poisoned or sequence.offer):
                self._kept.publish(shape, chain, copy.held, whole)
            self._kept.free(shape, chain, copy.held, is_poisoned, sequence.offer)
        self.prefixes.free(shape, chain, sequence.held, is_poisoned)
        self._resting.pop(sequence.order, None)
        sequence.forget_kv()
        if sequence.is_adopted and self.prefixes.is_on:
            self._return.begin()

    def await_any(self, sequences: list[Sequence]) -> list[Sequence]:
        coming = {s.order: t for s in sequences if (t := self._coming(s)) is not None}
        if len(coming) == len(sequences) and coming:
            first = next(iter(coming.values()))
            if not first.wait(timeout_s=COPY_S):
                first.cancel()
        for sequence in sequences:
            ticket = coming.get(sequence.order)
            if ticket is not None and (ticket.has_failed or ticket.is_cancelled):
                # A prefill goes without it.
                reason = ticket.failure or "not in time"
                log.warning("KV did not come in request=%s: %s", sequence.request.id, reason)
                with self.lock:
                    self.free(sequence)
        return [s for s in sequences if s.order not in coming or coming[s.order].is_done]

    def begin_turn(self, own: Iterable[Sequence], others: Iterable[Sequence]) -> None:
        for sequence in others:
            if sequence.blocks and not sequence.offer:
                self._resting[sequence.order] = sequence
                self._save(sequence, IDLE)
        self._spill.begin()
        own = tuple(own)
        for sequence in own:
            self._resting.pop(sequence.order, None)
        for sequence in own:
            # One that was offered to others is not ours to go on with.
            if sequence.cached and not sequence.blocks and not sequence.offer:
                self._grow(sequence, is_patient=False)

    def offer(self, sequence: Sequence, by_host: bool = False) -> KvHandle:
        if self._lending is not None:
            self._lending.take_back(sequence)
            if by_host:
                self._lending.stop("another instance cannot reach this one's memory")
            handle = None if self._is_coming(sequence) else self._lending.lend(sequence)
            if handle is not None:
                self._resting.pop(sequence.order, None)
                return handle
        if not self._is_saved_in_time(sequence):
            return offer_blocks(self._host, sequence, [])
        copy = self._copies[sequence.order]
        is_ours = self._kept.make_private(sequence.shape, sequence.chain, copy.held, self.lock)
        handle = offer_blocks(self._host, sequence, copy.blocks if is_ours else [])
        self._leave_device(sequence)
        return handle

    def recall(self, sequence: Sequence) -> bool:
        if self._lending is not None and self._lending.has_lent(sequence):
            return self._lending.recall(sequence)
        copy = self._copies.get(sequence.order)
        return recall_blocks(self._host, sequence, [] if copy is None else copy.blocks)

    @property
    def shared(self) -> KvPool:
        return self._host

    def expose(self, sequence: Sequence) -> list[int]:
        if not sequence.cached or not self._is_saved_in_time(sequence):
            return []
        return self._copies[sequence.order].blocks[: blocks_for(sequence.cached)]

    def put(self, sequence: Sequence, blocks: list[int], kv: KvHandle) -> None:
        self._copies[sequence.order] = HostCopy(Held(blocks), kv.cached_tokens)
        sequence.adopt(kv)

    def take(self, sequence: Sequence, kv: KvHandle) -> None:
        try:
            pool, blocks = self._take(sequence, kv)
        except OutOfBlocks:
            if not self._spill.stop():
                raise
            pool, blocks = self._take(sequence, kv)
        if pool is self.pool:
            sequence.held = Held(blocks)
            sequence.adopt(kv)
        else:
            self.put(sequence, blocks, kv)

    def close(self) -> None:
        self._return.close()
        self._copier.close()
        if self._lending is not None:
            self._lending.close()
        self._host.close()
        self.pool.close()

    def _take(self, sequence: Sequence, kv: KvHandle) -> Blocks:
        if self._lending is not None and kv.device is not None:
            return self._lending.take(
                sequence, kv, self.lock, lambda count: self._clear_for(sequence, count)
            )
        take_blocks(self._host, sequence.shape, kv)
        return self._host, list(kv.blocks)

    # Out

    def _save(self, sequence: Sequence, priority: int) -> bool:
        """Have the host's copy brought up to date; False where it has no room for it."""
        copy = self._copies.setdefault(sequence.order, HostCopy())
        if not sequence.blocks or copy.tokens == sequence.cached:
            if copy.going_out is not None:
                copy.going_out.raise_priority(priority)
            return True
        copy.settle(sequence.shape.block_bytes)
        used = blocks_for(sequence.cached)
        missing = used - len(copy.blocks)
        # The last block that was saved may have been written to since.
        copy.first = copy.tokens // BLOCK_TOKENS
        start = sequence.blocks[copy.first : used]
        try:
            copy.blocks.extend(self._allocate_on_host(sequence, missing))
            to = copy.blocks[copy.first : used]
            segments = segments_of(sequence.shape, (self._host, to), (self.pool, start))
            copy.going_out = self._copier.submit(segments, priority, is_outward=True)
        except (OutOfBlocks, CopyError) as error:
            log.debug("KV not saved request=%s error=%s", sequence.request.id, error)
            return False
        copy.tokens = sequence.cached
        self._traffic.watch("kv_out", copy.going_out)
        return True

    def _allocate_on_host(self, sequence: Sequence, count: int) -> list[int]:
        if count <= 0:
            return []
        try:
            return self._host.allocate(sequence.shape, count)
        except OutOfBlocks:
            if not self._spill.stop():
                raise
            return self._host.allocate(sequence.shape, count)

    def _is_saved(self, sequence: Sequence) -> bool:
        copy = self._copies.get(sequence.order)
        if copy is None or copy.tokens != sequence.cached:
            return False
        return copy.going_out is None or copy.going_out.is_done

    def _is_saved_in_time(self, sequence: Sequence) -> bool:
        """Save it and wait for that, without the lock; say whether it is on the host now.

        It may be released meanwhile: then it is not.
        """
        if not self._save(sequence, URGENT):
            return False
        ticket = self._copies[sequence.order].going_out
        if ticket is not None and not ticket.is_done:
            self.lock.release()
            try:
                ticket.wait(timeout_s=COPY_S)
            finally:
                self.lock.acquire()
        return self._is_saved(sequence)

    def _is_worth_keeping(self, sequence: Sequence) -> bool:
        """Whether to copy what the host has not yet, and all back, is quicker than a prefill."""
        if not sequence.cached:
            return False
        copy = self._copies.get(sequence.order)
        used = blocks_for(sequence.cached)
        out = 0
        if copy is None or copy.tokens != sequence.cached:
            out = used - (0 if copy is None else copy.tokens // BLOCK_TOKENS)
        moved_bytes = (out + used) * sequence.shape.block_bytes
        model = sequence.request.model
        return self._costs.is_worth_copying(model, sequence.cached, moved_bytes)

    def _clear_for(self, sequence: Sequence, missing: int) -> None:
        if missing > self.pool.free_blocks(sequence.shape):
            self._clear_resting(sequence, missing, is_patient=False)

    def _clear_resting(self, wanting: Sequence, missing: int, is_patient: bool) -> None:
        """Have other models' sequences leave the device until there is room: first those whose
        copies are on the host by now, then those that have to be waited for."""
        for may_wait in (False, True)[: 1 + is_patient]:
            for sequence in tuple(self._resting.values()):
                if missing <= self.pool.free_blocks(wanting.shape):
                    return
                if sequence.order not in self._resting:
                    continue  # released while we waited for another one
                if self._is_saved_in_time(sequence) if may_wait else self._is_saved(sequence):
                    self._leave_device(sequence)

    def _leave_device(self, sequence: Sequence) -> None:
        copy = self._copies.get(sequence.order)
        if copy is not None and copy.coming_in is not None:
            copy.coming_in.cancel()
            copy.coming_in = None
        self.prefixes.free(sequence.shape, sequence.chain, sequence.held, sequence.is_unsure)
        self._resting.pop(sequence.order, None)

    # In

    def _grow(self, sequence: Sequence, is_patient: bool) -> bool:
        # Whoever computes does not rest, though no turn began.
        self._resting.pop(sequence.order, None)
        is_new = not sequence.blocks
        if is_new:
            self._find(sequence)
        missing = blocks_for(sequence.tokens) - len(sequence.blocks)
        if missing <= 0:
            return True
        if missing > self.pool.free_blocks(sequence.shape):
            self._clear_resting(sequence, missing, is_patient)
        try:
            blocks = self.pool.allocate(sequence.shape, missing)
        except OutOfBlocks as error:
            self.shortage = str(error)
            self._unfind(sequence, is_new)
            return False
        is_away = blocks_for(sequence.cached) > len(sequence.blocks)
        if is_away and not self._bring_in(sequence, blocks):
            self.pool.free(sequence.shape, blocks)
            self._unfind(sequence, is_new)
            return False
        sequence.blocks.extend(blocks)
        return True

    def _find(self, sequence: Sequence) -> None:
        """Have a sequence without blocks begin with those that the device has for it. One without
        KV goes on with those that the host has beyond these, if they are worth bringing in."""
        shape, chain = sequence.shape, sequence.chain
        if sequence.cached:
            sequence.held = self.prefixes.find(shape, chain, sequence.whole_blocks)
            return
        if not sequence.is_shareable:
            return
        self._spill.collect()
        most = sequence.findable_tokens // BLOCK_TOKENS
        sequence.held = self.prefixes.find(shape, chain, most)
        found = len(sequence.blocks)
        if self._more_on_host(sequence, found, most):
            kept = self._kept.find(shape, chain, most)
            if len(kept.blocks) > found:
                found = len(kept.blocks)
                self._copies[sequence.order] = HostCopy(kept, found * BLOCK_TOKENS)
            else:
                self._kept.free(shape, chain, kept)
        sequence.cached = sequence.sound = sequence.found = found * BLOCK_TOKENS

    def _more_on_host(self, sequence: Sequence, found: int, most: int) -> int:
        """How many blocks of a new sequence the host has beyond those `found`, `most` in all; 0
        where they are not worth bringing in."""
        more = self._kept.knows(sequence.shape, sequence.chain, most) - found
        tokens, moved_bytes = more * BLOCK_TOKENS, more * sequence.shape.block_bytes
        model = sequence.request.model
        return more if more > 0 and self._costs.is_worth_copying(model, tokens, moved_bytes) else 0

    def _unfind(self, sequence: Sequence, is_new: bool) -> None:
        """Take back what `_find` did, if it did, for a sequence that does not get on."""
        if not is_new:
            return
        self.prefixes.free(sequence.shape, sequence.chain, sequence.held)
        if sequence.found:
            self.free(sequence)

    def _bring_in(self, sequence: Sequence, blocks: list[int]) -> bool:
        """Have the host's copy come in to `blocks`, beyond those that it has; False while too much
        else is under way."""
        copy = self._copies[sequence.order]
        first, used = len(sequence.blocks), blocks_for(sequence.cached)
        to, start = blocks[: used - first], copy.blocks[first:used]
        segments = segments_of(sequence.shape, (self.pool, to), (self._host, start))
        try:
            copy.coming_in = self._copier.submit(segments, URGENT)
        except CopyQueueFull as error:
            self.shortage = str(error)
            return False
        self._traffic.watch("kv_in", copy.coming_in)
        return True

    def _is_coming(self, sequence: Sequence) -> bool:
        ticket = self._coming(sequence)
        return ticket is not None and not ticket.is_done

    def _coming(self, sequence: Sequence) -> CopyTicket | None:
        copy = self._copies.get(sequence.order)
        return None if copy is None else copy.coming_in
