"""The sequences an engine knows: their tokens, their KV blocks, and who yields when blocks run out.

Not thread-safe; the engine holds its lock around every verb.
"""

from collections.abc import Iterable

from aegaeon.errors import AegaeonError, KvGone, OutOfBlocks
from aegaeon.memory.kv import KvPool, KvShape, blocks_for
from aegaeon.types import FinishReason, KvHandle, Request, RequestId


class Sequence:
    """One request's tokens and the blocks that hold the first `cached` of them."""

    __slots__ = (
        *("blocks", "cached", "context_tokens", "generated", "offer", "order", "request", "shape"),
    )

    def __init__(self, request: Request, shape: KvShape, context_tokens: int, order: int) -> None:
        self.request = request
        self.shape = shape
        self.context_tokens = context_tokens
        self.order = order
        self.generated = list(request.generated_token_ids)
        self.blocks: list[int] = []
        self.offer = 0  # under which they may be taken by another instance
        self.cached = 0

    @property
    def tokens(self) -> int:
        """Tokens known so far, prompt and generated."""
        return len(self.request.prompt_token_ids) + len(self.generated)

    def slice(self, start: int, stop: int) -> list[int]:
        """Return the token ids at positions start .. stop - 1."""
        prompt = self.request.prompt_token_ids
        made = self.generated[max(start - len(prompt), 0) : max(stop - len(prompt), 0)]
        return [*prompt[start:stop], *made]

    def append(self, token_id: int) -> FinishReason | None:
        """Take a new token and say whether, and why, it is the last."""
        self.generated.append(token_id)
        if token_id in self.request.stop_token_ids:
            return "stop"
        if len(self.generated) >= self.request.max_tokens or self.tokens >= self.context_tokens:
            return "length"
        return None


class SequenceTable:
    """All sequences of an engine over one KvPool, in the order they came."""

    def __init__(self, pool: KvPool) -> None:
        self._pool = pool
        self._sequences: dict[RequestId, Sequence] = {}
        self._holders: dict[int, Sequence] = {}
        self._next_order = 0

    def add(self, request: Request, shape: KvShape, context_tokens: int) -> None:
        """Make `request` known. Raises OutOfBlocks if it could not end even alone."""
        most = len(request.prompt_token_ids) + request.max_tokens
        # The last token is made, never cached.
        need = blocks_for(min(most, context_tokens) - 1)
        capacity = self._pool.capacity_blocks(shape)
        if need > capacity:
            raise OutOfBlocks(
                f"the request needs {need} KV blocks of {shape.block_bytes} bytes, the pool has "
                f"{capacity}; lower max_tokens, shorten the prompt or raise --kv-budget-gb"
            )
        self._sequences[request.id] = Sequence(request, shape, context_tokens, self._next_order)
        self._next_order += 1

    def get(self, request: RequestId) -> Sequence:
        """Return a known sequence."""
        return self._sequences[request]

    def remove(self, request: RequestId, is_poisoned: bool = False) -> None:
        """Forget a sequence and free its KV; unknown ids are ignored.

        `is_poisoned`: its KV may hold what is no finite number.
        """
        sequence = self._sequences.pop(request, None)
        if sequence is not None:
            self.free_kv(sequence, is_poisoned)

    def hand_over(self, request: RequestId) -> KvHandle:
        """Name the KV of a sequence, which loses it to nobody here from now on."""
        sequence = self._sequences[request]
        self._holders.pop(sequence.order, None)
        if sequence.blocks:
            offer = self._pool.offer(sequence.shape, sequence.blocks)
            assert offer is not None, "nobody takes what was not offered"
            sequence.offer = offer
        return KvHandle(
            owner=sequence.offer,
            blocks=tuple(sequence.blocks),
            cached_tokens=sequence.cached,
            kv_bytes=len(sequence.blocks) * sequence.shape.block_bytes,
            pool=self._pool.name,
            shape=_layout(sequence.shape),
        )

    def adopt(self, request: Request, shape: KvShape, context_tokens: int, kv: KvHandle) -> None:
        """Make `request` known with the KV of `kv`, or raise KvGone or OutOfBlocks and know it not.

        Its blocks are taken from their owner as they are: no bytes move.
        """
        if not kv.pool or kv.pool != self._pool.name or kv.shape != _layout(shape):
            raise KvGone("the KV lies in another pool or in another layout; prefill again")
        self.add(request, shape, context_tokens)
        try:
            if not self._pool.take(shape, kv.blocks, kv.owner):
                raise KvGone(f"{len(kv.blocks)} KV blocks are not the sender's now; prefill again")
        except AegaeonError:
            self.remove(request.id)
            raise
        sequence = self._sequences[request.id]
        sequence.blocks = list(kv.blocks)
        sequence.cached = kv.cached_tokens
        self._holders[sequence.order] = sequence

    def free_kv(self, sequence: Sequence, is_poisoned: bool = False) -> None:
        """Give up what is cached; the tokens stay. `is_poisoned`: see remove."""
        self._pool.free(sequence.shape, sequence.blocks, is_poisoned, sequence.offer)
        self._holders.pop(sequence.order, None)
        sequence.blocks = []
        sequence.offer = 0
        sequence.cached = 0

    def make_room(self, sequences: Iterable[Sequence]) -> tuple[list[Sequence], list[RequestId]]:
        """Give each sequence blocks for all its tokens, the oldest first.

        Where blocks run out the youngest holder of any model loses its KV, and a sequence with no
        younger holder yields itself: so the oldest one always gets on. Returns those with room, in
        the given order, and the ids of those that lost their KV or found no room.
        """
        wanted = list(sequences)
        lost: dict[int, Sequence] = {}
        for sequence in sorted(wanted, key=lambda s: s.order):
            while sequence.order not in lost and not self._grow(sequence):
                victim = self._holders[max(self._holders)] if self._holders else sequence
                if victim.order < sequence.order:
                    victim = sequence
                self.free_kv(victim)
                lost[victim.order] = victim
        ready = [sequence for sequence in wanted if sequence.order not in lost]
        return ready, [sequence.request.id for sequence in lost.values()]

    def clear(self) -> None:
        """Forget every sequence."""
        for request in list(self._sequences):
            self.remove(request)

    def _grow(self, sequence: Sequence) -> bool:
        missing = blocks_for(sequence.tokens) - len(sequence.blocks)
        if missing <= 0:
            return True
        try:
            sequence.blocks.extend(self._pool.allocate(sequence.shape, missing))
        except OutOfBlocks:
            return False
        self._holders[sequence.order] = sequence
        return True


def _layout(shape: KvShape) -> tuple[int, ...]:
    """What two instances must agree on for one to read the other's blocks."""
    return (shape.layers, shape.kv_heads, shape.head_dim, shape.dtype.itemsize)
