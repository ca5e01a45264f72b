"""Where sequences' keys and values lie and how room for them is made: the seam, and the simple kind
that computes on the node's pool itself. engine/kv_swap.py is for devices with memory of their own.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable

from aegaeon.engine.sequence import Sequence
from aegaeon.errors import KvGone, KvUnreachable, OutOfBlocks
from aegaeon.memory.kv import BLOCK_TOKENS, KvPool, KvShape, blocks_for
from aegaeon.memory.prefixes import Held, Prefixes
from aegaeon.types import KvHandle


class KvPlace(ABC):
    """The caller holds `lock` around every verb but `await_any` and `close`.

    `grow`, `give_up`, `offer` and `take` let go of it while they wait for a copy: sequences that
    are not part of the running action may come and go meanwhile.

    A sequence's `blocks` are those that a forward pass uses; they hold its first `cached` tokens,
    or will when `await_any` has returned it. One that has none may begin with blocks of others.
    """

    def __init__(self, pool: KvPool, is_sharing: bool = False) -> None:
        """Take over `pool`; with `is_sharing`, sequences share what they begin with."""
        self.pool = pool  # what a forward pass reads and writes
        self.prefixes = Prefixes(pool, is_sharing)
        self.lock = threading.Lock()
        self.shortage = ""  # why the last `grow` that failed did

    @abstractmethod
    def grow(self, sequence: Sequence) -> bool:
        """Give it blocks for all its tokens; False, and nothing done, where there are not enough.

        KV that is elsewhere begins to come in.
        """

    @abstractmethod
    def known_tokens(self, sequence: Sequence) -> int:
        """Return how many of its tokens `grow` would find, or has: a guess, for who plans."""

    @abstractmethod
    def give_up(self, sequence: Sequence) -> bool:
        """Take its blocks away; say whether its KV is kept elsewhere. If not, nothing is cached."""

    @abstractmethod
    def free(self, sequence: Sequence, is_poisoned: bool = False) -> None:
        """Free all its KV, wherever it is; `is_poisoned` as in KvPool.free."""

    @abstractmethod
    def await_any(self, sequences: list[Sequence]) -> list[Sequence]:
        """Wait until the KV of at least one is in; return all of which that is true."""

    @abstractmethod
    def begin_turn(self, own: Iterable[Sequence], others: Iterable[Sequence]) -> None:
        """The device now belongs to the model of `own`."""

    @abstractmethod
    def offer(self, sequence: Sequence, by_host: bool = False) -> KvHandle:
        """Name its KV so that another instance of the node may take it; `by_host`: in memory that
        any of them reaches, which one of them asks for."""

    @abstractmethod
    def recall(self, sequence: Sequence) -> bool:
        """Have nobody take its KV any more by a name that `offer` gave; False where one has."""

    @property
    @abstractmethod
    def shared(self) -> KvPool:
        """The node's pool."""

    @abstractmethod
    def expose(self, sequence: Sequence) -> list[int]:
        """Have all its KV in blocks of the node's pool, and return those; none where that cannot
        be. They stay as they are while the sequence computes no more."""

    @abstractmethod
    def put(self, sequence: Sequence, blocks: list[int], kv: KvHandle) -> None:
        """Make `blocks` of the node's pool, that are ours and hold what `kv` says, the KV of a
        sequence without any."""

    @abstractmethod
    def take(self, sequence: Sequence, kv: KvHandle) -> None:
        """Make the KV of `kv` that of a sequence without any. Raises KvGone, KvUnreachable,
        OutOfBlocks."""

    @abstractmethod
    def close(self) -> None:
        """Free everything and leave the pools. Idempotent."""


class InPlaceKv(KvPlace):
    """Everything stays where it was computed; there is no elsewhere."""

    def grow(self, sequence: Sequence) -> bool:
        if not sequence.blocks and sequence.is_shareable:
            self._begin(sequence)
        missing = blocks_for(sequence.tokens) - len(sequence.blocks)
        if missing <= 0:
            return True
        try:
            sequence.blocks.extend(self.pool.allocate(sequence.shape, missing))
        except OutOfBlocks as error:
            self.shortage = str(error)
            return False
        return True

    def known_tokens(self, sequence: Sequence) -> int:
        if sequence.cached or not sequence.is_shareable:
            return sequence.cached
        most = sequence.findable_tokens // BLOCK_TOKENS
        return self.prefixes.knows(sequence.shape, sequence.chain, most) * BLOCK_TOKENS

    def give_up(self, sequence: Sequence) -> bool:
        self.free(sequence)
        return False

    def free(self, sequence: Sequence, is_poisoned: bool = False) -> None:
        is_poisoned = is_poisoned or sequence.is_unsure
        if not (is_poisoned or sequence.offer):
            self._keep(sequence)
        self.prefixes.free(
            sequence.shape, sequence.chain, sequence.held, is_poisoned, sequence.offer
        )
        sequence.forget_kv()

    def await_any(self, sequences: list[Sequence]) -> list[Sequence]:
        return list(sequences)

    def begin_turn(self, own: Iterable[Sequence], others: Iterable[Sequence]) -> None:
        """Nothing moves."""

    def offer(self, sequence: Sequence, by_host: bool = False) -> KvHandle:  # noqa: ARG002
        shape, chain, held = sequence.shape, sequence.chain, sequence.held
        is_ours = self.prefixes.make_private(shape, chain, held, self.lock)
        return offer_blocks(self.pool, sequence, sequence.blocks if is_ours else [])

    def recall(self, sequence: Sequence) -> bool:
        return recall_blocks(self.pool, sequence, sequence.blocks)

    @property
    def shared(self) -> KvPool:
        return self.pool

    def expose(self, sequence: Sequence) -> list[int]:
        return sequence.blocks[: blocks_for(sequence.cached)]

    def put(self, sequence: Sequence, blocks: list[int], kv: KvHandle) -> None:
        sequence.held = Held(blocks)
        sequence.adopt(kv)

    def take(self, sequence: Sequence, kv: KvHandle) -> None:
        take_blocks(self.pool, sequence.shape, kv)
        self.put(sequence, list(kv.blocks), kv)

    def close(self) -> None:
        self.pool.close()

    def _begin(self, sequence: Sequence) -> None:
        """Have it begin with what others have left of its tokens."""
        shape, chain = sequence.shape, sequence.chain
        most = sequence.findable_tokens
        sequence.held = held = self.prefixes.find(shape, chain, most // BLOCK_TOKENS)
        at = len(held.blocks)
        sequence.cached = at * BLOCK_TOKENS
        wanted = chain.tokens(at, min(BLOCK_TOKENS, most - sequence.cached))
        border = self.prefixes.find_border(shape, chain.before(at), wanted)
        if border is not None:
            key, block, tokens = border
            if self._has_own_block(sequence):
                self.pool.copy(shape, held.blocks[at], block)
                sequence.cached += tokens
            self.prefixes.let_go(shape, (key,))
        sequence.sound = sequence.found = sequence.cached

    def _has_own_block(self, sequence: Sequence) -> bool:
        """Give it a block more; False where there is none."""
        try:
            sequence.blocks.extend(self.pool.allocate(sequence.shape, 1))
        except OutOfBlocks as error:
            self.shortage = str(error)
            return False
        return True

    def _keep(self, sequence: Sequence) -> None:
        """Leave its last block, where that is not whole, for others to begin with."""
        shape, chain, held = sequence.shape, sequence.chain, sequence.held
        at, tokens = divmod(sequence.sound, BLOCK_TOKENS)
        is_known = sequence.is_shareable and at == len(held.shares)
        if tokens and is_known and self.prefixes.is_on:
            block = held.blocks.pop(at)
            self.prefixes.keep_border(shape, chain.before(at), chain.tokens(at, tokens), block)


def offer_blocks(pool: KvPool, sequence: Sequence, blocks: list[int]) -> KvHandle:
    """Return a handle by which `blocks` of the shared `pool` may be taken."""
    offer = pool.offer(sequence.shape, blocks) if blocks else None
    if offer is None:
        return KvHandle(owner=0, blocks=(), cached_tokens=0)
    sequence.offer = offer
    return KvHandle(
        owner=offer,
        blocks=tuple(blocks),
        cached_tokens=sequence.cached,
        kv_bytes=len(blocks) * sequence.shape.block_bytes,
        pool=pool.name,
        shape=layout_of(sequence.shape),
        identity=sequence.sound_identity,
    )


def recall_blocks(pool: KvPool, sequence: Sequence, blocks: list[int]) -> bool:
    """Have nobody take `blocks` any more that were offered; False where somebody has."""
    if sequence.offer:
        # A newer offer, of which nobody is told, makes the old one void.
        offer = pool.offer(sequence.shape, blocks) if blocks else None
        if offer is None:
            return False
        sequence.offer = 0
    return True


def take_blocks(pool: KvPool, shape: KvShape, kv: KvHandle) -> None:
    """Make the blocks of `kv` ours: no bytes move. Raises KvGone, KvUnreachable, OutOfBlocks."""
    check_layout(pool, shape, kv)
    if kv.device is not None:
        raise KvUnreachable(f"the KV is in the memory of {kv.device.device}")
    if not 0 < kv.cached_tokens <= len(kv.blocks) * BLOCK_TOKENS:
        raise KvGone(
            f"{len(kv.blocks)} KV blocks do not hold {kv.cached_tokens} tokens; prefill again"
        )
    take_offered(pool, shape, kv)


def check_layout(pool: KvPool, shape: KvShape, kv: KvHandle) -> None:
    """Raise KvGone for KV that is not of this pool and shape."""
    if not kv.pool or kv.pool != pool.name or kv.shape != layout_of(shape):
        raise KvGone("the KV lies in another pool or in another layout; prefill again")


def take_offered(pool: KvPool, shape: KvShape, kv: KvHandle) -> None:
    """Make the pool's blocks under the offer of `kv` ours. Raises KvGone, OutOfBlocks."""
    try:
        is_ours = pool.take(shape, kv.blocks, kv.owner)
    except (ValueError, TypeError) as error:
        # It came by mail, so its numbers may be anything.
        raise KvGone(f"the KV is not in this pool ({error}); prefill again") from None
    if not is_ours:
        raise KvGone(f"{len(kv.blocks)} KV blocks are not the sender's any more; prefill again")


def layout_of(shape: KvShape) -> tuple[int, ...]:
    """What two instances must agree on for one to read the other's blocks."""
    return (shape.layers, shape.kv_heads, shape.head_dim, shape.dtype.itemsize)
