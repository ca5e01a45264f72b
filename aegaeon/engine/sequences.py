"""The sequences an engine knows, in the order they came, and who yields when blocks run out.

Not thread-safe; the engine holds its lock around every verb. Where KV lies is a KvPlace's business.
"""

import contextlib
from collections.abc import Iterable

from aegaeon.engine.kv_place import KvPlace
from aegaeon.engine.sequence import Sequence
from aegaeon.errors import DeviceLost, KvGone, OutOfBlocks
from aegaeon.memory.kv import KvShape, blocks_for
from aegaeon.types import KvHandle, ModelId, ModelSpec, Request, RequestId


class SequenceTable:
    """All sequences of an engine over one KvPlace."""

    def __init__(self, place: KvPlace) -> None:
        self._place = place
        self._sequences: dict[RequestId, Sequence] = {}
        self._holders: dict[int, Sequence] = {}  # by order; those that may lose their blocks
        self._next_order = 0

    def add(self, request: Request, shape: KvShape, context_tokens: int) -> Sequence:
        """Make `request` known. Raises OutOfBlocks if it could not end even alone."""
        most = len(request.prompt_token_ids) + request.max_tokens
        # The last token is made, never cached; behind a prompt that is all the context, too.
        need = blocks_for(min(most, context_tokens + (request.max_tokens == 1)) - 1)
        capacity = self._place.pool.capacity_blocks(shape)
        if need > capacity:
            raise OutOfBlocks(
                f"the request needs {need} KV blocks of {shape.block_bytes} bytes, the pool has "
                f"{capacity}; lower max_tokens, shorten the prompt or raise --kv-budget-gb"
            )
        sequence = Sequence(request, shape, context_tokens, self._next_order)
        self._sequences[request.id] = sequence
        self._next_order += 1
        return sequence

    def get(self, request: RequestId) -> Sequence:
        """Return a known sequence."""
        return self._sequences[request]

    def find(self, request: RequestId) -> Sequence | None:
        """Return a sequence if it is known."""
        return self._sequences.get(request)

    def remove(self, request: RequestId, is_poisoned: bool = False) -> Sequence | None:
        """Forget a sequence, free its KV and return it; None for unknown ids.

        `is_poisoned`: what is not finite may be among its keys and values.
        """
        sequence = self._sequences.pop(request, None)
        if sequence is not None:
            self._holders.pop(sequence.order, None)
            self._place.free(sequence, is_poisoned)
        return sequence

    def set_apart(self, request: RequestId) -> Sequence:
        """Have a sequence lose its KV to nobody here from now on; return it."""
        sequence = self._sequences[request]
        self._holders.pop(sequence.order, None)
        sequence.is_apart = True
        return sequence

    def hand_over(self, request: RequestId, by_host: bool = False) -> KvHandle:
        """Name the KV of a sequence, which loses it to nobody here from now on. Of what others may
        begin with it is a copy."""
        return self._place.offer(self.set_apart(request), by_host)

    def resume(self, request: RequestId) -> bool:
        """Have a sequence that was set apart go on here, if all its KV is ours still."""
        sequence = self._sequences[request]
        if not self._place.recall(sequence):
            return False
        sequence.is_apart = False
        if sequence.blocks:
            self._holders[sequence.order] = sequence
        return True

    def adopt(
        self,
        request: Request,
        spec: ModelSpec,
        shape: KvShape,
        kv: KvHandle,
        brought: list[int] | None = None,
    ) -> None:
        """Make `request` known with the KV of `kv`, in blocks of the node's pool that are ours
        where it was `brought`, or raise KvGone, KvUnreachable or OutOfBlocks and know it not."""
        context_tokens = spec.context_tokens
        sequence = self.add(request, shape, context_tokens)
        try:
            if kv.cached_tokens >= sequence.tokens:  # there is always one to go on with
                raise KvGone(
                    f"KV of {kv.cached_tokens} tokens does not belong to a request of "
                    f"{sequence.tokens}; prefill again"
                )
            if brought is not None:
                self._place.put(sequence, brought, kv)
            else:
                self._place.take(sequence, kv)
        except BaseException:
            self.remove(request.id)
            raise
        self._holders[sequence.order] = sequence

    def make_room(self, sequences: Iterable[Sequence]) -> tuple[list[Sequence], list[RequestId]]:
        """Give each sequence blocks for all its tokens, the oldest first.

        Where blocks run out the youngest holder of any model yields its own, and a sequence with no
        younger holder yields itself: so the oldest one always gets on. Returns those with blocks,
        in the given order, and the ids of those that lost their KV or found no room; whose KV is
        kept elsewhere is in neither, and goes on in a later step.
        """
        wanted = list(sequences)
        without: set[int] = set()
        lost: dict[int, Sequence] = {}
        for sequence in sorted(wanted, key=lambda s: s.order):
            while sequence.order not in without and not self._grow(sequence):
                victim = self._holders[max(self._holders)] if self._holders else sequence
                if victim.order < sequence.order:
                    victim = sequence
                self._holders.pop(victim.order, None)
                without.add(victim.order)
                is_kept = self._place.give_up(victim)
                if not is_kept or victim is sequence:
                    lost[victim.order] = victim
        ready = [sequence for sequence in wanted if sequence.order not in without]
        return ready, [sequence.request.id for sequence in lost.values()]

    def begin_turn(self, model: ModelId) -> None:
        """The device now belongs to `model`."""
        everyone = self._sequences.values()
        own = [sequence for sequence in everyone if sequence.request.model == model]
        others = [sequence for sequence in everyone if sequence.request.model != model]
        self._place.begin_turn(own, others)
        for sequence in own:
            # Nothing takes the blocks of one that is handed over.
            if sequence.blocks and not sequence.is_apart:
                self._holders[sequence.order] = sequence

    def clear(self) -> None:
        """Forget every sequence. What a lost device had of them is lost with it."""
        for request in list(self._sequences):
            with contextlib.suppress(DeviceLost):
                self.remove(request)

    def _grow(self, sequence: Sequence) -> bool:
        if not self._place.grow(sequence):
            return False
        self._holders[sequence.order] = sequence
        return True
