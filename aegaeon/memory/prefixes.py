"""KV blocks that hold what several sequences begin with: found by content, shared, kept at rest.

The design. A block's key is a hash of its 16 tokens, of the key of the block before it and, for the
first, of what computes: so equal keys mean equal tokens from the first on, run by the same weights
in the same types. As keys and values of a token depend on the tokens up to it alone, to the bit, a
block found here is the one that a prefill would make.

A block is shared from when it is whole and its step's logits were finite: nobody writes to it any
more. Where it is used by several, they count in `uses`; where by nobody, it rests in its pool
(KvPool.rest): free for whoever needs room, in whatever process, the longest unused first. So this
index keeps nobody waiting, and what it says of a resting block is a guess until the pool wakes it.

What rests in a pool of several clients is told to all of them (KvPool.tell), and whoever needs it
next wakes it: what one instance prefilled and another decoded is there for the next turn, at either
or at a third. What somebody uses is its process's alone.

A sequence that goes on inside a block of another one, at the border of what they have in common,
copies the tokens that it shares into a block of its own.
"""

import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from aegaeon.errors import OutOfBlocks
from aegaeon.memory.kv import BLOCK_TOKENS, KvPool, KvShape

Key = bytes
KEY_BYTES = 16
# Fewer tokens than these are prefilled sooner than found and copied.
LEAST_BORDER_TOKENS = 2
# So many entries may be stale before they are looked for.
LEAST_SWEEP = 1024


def key_of(before: Key, tokens: Iterable[int]) -> Key:
    """Return the key of a block of `tokens`, 16 or, for a last one, fewer, that follows the block
    `before`: for a first one, the name of what computes."""
    return blake2b(array("I", tokens).tobytes(), digest_size=KEY_BYTES, key=before).digest()


class Chain:
    """The keys of one sequence's blocks, made as far as they are asked for."""

    __slots__ = ("_keys", "_slice", "identity")

    def __init__(self, identity: Key, tokens: Callable[[int, int], Sequence[int]]) -> None:
        """`identity` names what computes; `tokens` returns those from one position to another."""
        self.identity = identity
        self._slice = tokens
        self._keys: list[Key] = []

    def walk(self, count: int) -> Iterator[Key]:
        """Yield the keys of the first `count` blocks."""
        for at in range(count):
            yield self.key(at)

    def key(self, at: int) -> Key:
        """Return the key of block number `at`."""
        for number in range(len(self._keys), at + 1):
            self._keys.append(key_of(self.before(number), self.tokens(number)))
        return self._keys[at]

    def before(self, at: int) -> Key:
        """Return what block number `at` follows; the one before it has a key already."""
        return self._keys[at - 1] if at else self.identity

    def tokens(self, at: int, count: int = BLOCK_TOKENS) -> tuple[int, ...]:
        """Return the first `count` tokens of block number `at`."""
        return tuple(self._slice(at * BLOCK_TOKENS, at * BLOCK_TOKENS + count))


@dataclass(slots=True)
class Held:
    """Blocks of one sequence in one pool, in token order; of the first ones, whether each is used
    through the index. The others are the sequence's alone."""

    blocks: list[int] = field(default_factory=list)
    shares: list[bool] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Entry:
    """A block that may be shared: what it holds, `tokens` behind those of the block `before`, and
    how many sequences use it. `word` wakes it, where none does."""

    key: Key
    before: Key
    tokens: tuple[int, ...]
    shape: KvShape
    block: int
    uses: int = 1
    word: int = 0


class Prefixes:
    """The blocks of one client of one pool that may be shared. Not thread-safe."""

    def __init__(self, pool: KvPool, is_on: bool = True) -> None:
        """Without `is_on` nothing is ever found, nor kept."""
        self.pool = pool
        self.is_on = is_on
        self._entries: dict[Key, Entry] = {}
        # By the block before and a first token: what came there last.
        self._next: dict[tuple[Key, int], Key] = {}
        self._sweep_at = LEAST_SWEEP
        # Where somebody looks there: what has come to rest since.
        self.ended: dict[Key, Entry] | None = None

    def __len__(self) -> int:
        """Blocks known, with those that have been evicted and not been missed yet."""
        return len(self._entries)

    def find(self, shape: KvShape, chain: Chain, most: int) -> Held:
        """Return the first blocks of `chain`, as many as are here, `most` of them, each in use from
        now on. Keys are only made so far."""
        held = Held()
        has_changed = self.is_on
        while has_changed:
            found = self._walk(shape, chain, len(held.blocks), most)
            resting = [at for at, entry in enumerate(found) if not entry.uses]
            woken = self._wake(shape, [found[at] for at in resting])
            # One that has been evicted may rest elsewhere in the pool by now.
            stale = [found[at].key for at in resting[woken:]]
            has_changed = self._drop_evicted(shape, stale) > 0
            # Of those behind it some may be awake, though not by us.
            del found[resting[woken] if stale else len(found) :]
            for entry in found:
                entry.uses += 1
                held.blocks.append(entry.block)
                held.shares.append(True)
        return held

    def has(self, shape: KvShape, key: Key) -> bool:
        """Whether the block of this key was here when it was asked for last, or rests elsewhere in
        the pool."""
        return key in self._entries or self._rests_elsewhere(shape, (key,)) is not None

    def is_here(self, entry: Entry) -> bool:
        """Whether `entry` holds still what it did when it was made."""
        if self._entries.get(entry.key) is not entry:
            return False
        return entry.uses > 0 or self.pool.still_rest(entry.shape, [entry.block], [entry.word])[0]

    def keep(self, entry: Entry, block: int) -> None:
        """Let `block` rest, which holds what that of `entry`, of another pool, does. It is the
        caller's, and no longer."""
        if self._add(Entry(entry.key, entry.before, entry.tokens, entry.shape, block)):
            self.let_go(entry.shape, (entry.key,))
        else:
            self.pool.free(entry.shape, (block,))

    def knows(self, shape: KvShape, chain: Chain, most: int) -> int:
        """Return how many blocks `find` would return just now; others may be quicker."""
        found: list[Entry] = []
        has_changed = self.is_on
        while has_changed:
            found = self._walk(shape, chain, 0, most)
            resting = [entry.key for entry in found if not entry.uses]
            has_changed = self._drop_evicted(shape, resting) > 0
        return len(found)

    def find_border(
        self, shape: KvShape, before: Key, tokens: Sequence[int]
    ) -> tuple[Key, int, int] | None:
        """Return a block that follows the block `before` and begins as `tokens` do: its key, in use
        from now on, itself, and how many of the tokens it holds."""
        entry = self._border(shape, before, tokens) if self.is_on else None
        if entry is None:
            return None
        if not entry.uses and not self._wake(shape, [entry]):
            self._drop_evicted(shape, [entry.key])
            return None
        entry.uses += 1
        return entry.key, entry.block, _common(tokens, entry.tokens)

    def publish(self, shape: KvShape, chain: Chain, held: Held, count: int) -> None:
        """Share the first `count` blocks of `held`, where they are not yet: they are whole. One
        that another sequence has, too, and uses stays its sequence's alone."""
        if not self.is_on:
            return
        for at in range(len(held.shares), count):
            names = chain.key(at), chain.before(at), chain.tokens(at)
            held.shares.append(self._add(Entry(*names, shape, held.blocks[at])))
        if len(self._entries) > self._sweep_at:
            self._sweep()

    def free(
        self, shape: KvShape, chain: Chain, held: Held, is_poisoned: bool = False, offer: int = 0
    ) -> None:
        """Let go of all of `held`, which then is empty; `is_poisoned` and `offer` as in
        KvPool.free, where blocks are the sequence's alone."""
        shares = held.shares
        shared = [chain.key(at) for at, is_shared in enumerate(shares) if is_shared]
        own = [b for at, b in enumerate(held.blocks) if at >= len(shares) or not shares[at]]
        self.pool.free(shape, own, is_poisoned, offer)
        self.let_go(shape, shared)
        held.blocks, held.shares = [], []

    def keep_border(self, shape: KvShape, before: Key, tokens: tuple[int, ...], block: int) -> None:
        """Let a block that ends in the middle rest, behind `before`, for others to copy from. It is
        the caller's, and no longer."""
        self.keep(Entry(key_of(before, tokens), before, tokens, shape, block), block)

    def let_go(self, shape: KvShape, keys: Sequence[Key]) -> None:
        """Those of `keys`, one behind the other, are used once less: the last to be needed again,
        those in front, rest longest."""
        ended: list[Key] = []
        for key in reversed(keys):
            entry = self._entries[key]
            entry.uses -= 1
            if not entry.uses:
                ended.append(key)
        if ended:
            blocks = [self._entries[key].block for key in ended]
            words = self.pool.rest(shape, blocks)
            if self.pool.is_shared:
                self.pool.tell(shape, ended, blocks, words)
            for key, word in zip(ended, words, strict=True):
                self._entries[key].word = word
                if self.ended is not None:
                    self.ended[key] = self._entries[key]

    def make_private(self, shape: KvShape, chain: Chain, held: Held, lock: threading.Lock) -> bool:
        """Make all blocks of `held` those of its sequence alone, so that they may be given away:
        shared ones are copied, or taken off the index where there is no room for copies. False,
        and nothing done, where that would harm others.

        Copies without `lock`, which the caller holds: nobody takes or writes to what is in use, and
        the sequence computes no more. It may be freed meanwhile: then False, too.
        """
        places = [at for at, is_shared in enumerate(held.shares) if is_shared]
        try:
            copies = self.pool.allocate(shape, len(places))
        except OutOfBlocks:
            if any(self._entries[chain.key(at)].uses > 1 for at in places):
                return False
            for at in places:
                del self._entries[chain.key(at)]
        else:
            starts = [held.blocks[at] for at in places]
            lock.release()
            try:
                for block, start in zip(copies, starts, strict=True):
                    self.pool.copy(shape, block, start)
            finally:
                lock.acquire()
            if places and not held.blocks:
                # What was copied may be anything.
                self.pool.free(shape, copies, is_poisoned=True)
                return False
            for at, block in zip(places, copies, strict=True):
                held.blocks[at] = block
            self.let_go(shape, [chain.key(at) for at in places])
        held.shares = []
        return True

    def _add(self, entry: Entry) -> bool:
        """Share the block of `entry`, in use, unless another one like it is in use."""
        known = self._entries.get(entry.key)
        if known is not None and known.uses:
            return False
        if known is not None and self._wake(known.shape, [known]):
            self.pool.free(known.shape, (known.block,))  # one of them is enough
        self._entries[entry.key] = entry
        self._next[entry.before, entry.tokens[0]] = entry.key
        return True

    def _walk(self, shape: KvShape, chain: Chain, start: int, most: int) -> list[Entry]:
        """Return what there seems to be of a chain from block number `start` on."""
        found: list[Entry] = []
        for at in range(start, most):
            key = chain.key(at)
            entry = self._entries.get(key)
            if entry is None:
                entry = self._rests_elsewhere(shape, (key,))
                if entry is None:
                    break
                self._note(entry, chain.before(at), chain.tokens(at))
            if entry.shape != shape:
                break
            found.append(entry)
        return found

    def _border(self, shape: KvShape, before: Key, tokens: Sequence[int]) -> Entry | None:
        """Return what follows the block `before` and has enough in common with `tokens`."""
        key = self._next.get((before, tokens[0])) if tokens else None
        entry = self._entries.get(key) if key is not None else None
        common = 0 if entry is None or entry.shape != shape else _common(tokens, entry.tokens)
        if common >= LEAST_BORDER_TOKENS:
            return entry
        # Of others we know nothing but keys: so it has to begin as a whole as the tokens do.
        counts = range(min(len(tokens), BLOCK_TOKENS - 1), LEAST_BORDER_TOKENS - 1, -1)
        keys = [key_of(before, tokens[:count]) for count in counts] if self.pool.is_shared else []
        known = next((self._entries[key] for key in keys if key in self._entries), None)
        if known is not None:
            return known if known.shape == shape else None
        entry = self._rests_elsewhere(shape, keys)
        if entry is not None:
            count = counts[keys.index(entry.key)]
            self._note(entry, before, tuple(tokens[:count]))
        return entry

    def _rests_elsewhere(self, shape: KvShape, keys: Sequence[Key]) -> Entry | None:
        """Return the first of `keys` that rests in the pool, whoever told of it; what it follows
        and holds is not said there."""
        if not self.pool.is_shared:
            return None
        for key, (block, word) in zip(keys, self.pool.look_up(shape, keys), strict=True):
            if word:
                return Entry(key, b"", (), shape, block, uses=0, word=word)
        return None

    def _note(self, entry: Entry, before: Key, tokens: tuple[int, ...]) -> None:
        """Know `entry`, which rests elsewhere, from here on."""
        entry.before, entry.tokens = before, tokens
        self._entries[entry.key] = entry
        self._next[before, tokens[0]] = entry.key

    def _wake(self, shape: KvShape, entries: list[Entry]) -> int:
        if not entries:
            return 0
        blocks, words = zip(*((entry.block, entry.word) for entry in entries), strict=True)
        return self.pool.wake(shape, blocks, words)

    def _drop_evicted(self, shape: KvShape, keys: Sequence[Key]) -> int:
        """Forget those of `keys`, in use by nobody, that have been evicted; return how many."""
        if not keys:
            return 0
        entries = [self._entries[key] for key in keys]
        blocks, words = [e.block for e in entries], [e.word for e in entries]
        rest = self.pool.still_rest(shape, blocks, words)
        for key, rests in zip(keys, rest, strict=True):
            if not rests:
                del self._entries[key]
        return rest.count(False)

    def _sweep(self) -> None:
        """Forget what has been evicted."""
        unused: dict[KvShape, list[Key]] = {}
        for key, entry in self._entries.items():
            if not entry.uses:
                unused.setdefault(entry.shape, []).append(key)
        for shape, keys in unused.items():
            self._drop_evicted(shape, keys)
        self._next = {at: key for at, key in self._next.items() if key in self._entries}
        if self.ended is not None:
            self.ended = {key: e for key, e in self.ended.items() if key in self._entries}
        self._sweep_at = max(LEAST_SWEEP, 2 * len(self._entries))


def _common(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Return how many tokens both begin with."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
