"""Which prompts were sent where: what a place computes it may keep, and need not compute again. For
places that cannot reach what others keep.

By hashes of blocks, each of its tokens and of all before them, in a bounded table. It is a guess: a
place may have made room for others since. One that is wrong costs little, for the prompt that was
sent there because of it is there from then on.
"""

from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

from aegaeon.types import ModelId

PlaceT = TypeVar("PlaceT", bound=Hashable)

BLOCK_TOKENS = 16  # as keys and values are kept
MOST_BLOCKS = 1 << 16  # remembered, about 12 MB
MOST_PLACES = 8  # of one block


class SentPrompts(Generic[PlaceT]):
    """Remembers the last prompts, a million tokens by default. Not thread-safe."""

    def __init__(self, most_blocks: int = MOST_BLOCKS) -> None:
        self._most_blocks = most_blocks
        # By the hash of a block and all before it: who was sent it, the last one first. The least
        # recently sent stand in front.
        self._sent: dict[int, tuple[PlaceT, ...]] = {}

    def __len__(self) -> int:
        """Blocks remembered."""
        return len(self._sent)

    @staticmethod
    def keys(model: ModelId, token_ids: Sequence[int]) -> list[int]:
        """Return the hashes of the blocks of a prompt that may be found: whole ones, of all tokens
        but the last, which is always run."""
        key, keys = hash(model), list[int]()
        for at in range(0, len(token_ids) - BLOCK_TOKENS, BLOCK_TOKENS):
            key = hash((key, *token_ids[at : at + BLOCK_TOKENS]))
            keys.append(key)
        return keys

    def known(self, keys: Sequence[int]) -> dict[PlaceT, int]:
        """Return of how many of the prompt's first tokens each place may have keys and values."""
        found: dict[PlaceT, int] = {}
        for before, key in enumerate(keys):
            has_more = False
            for place in self._sent.get(key, ()):
                if found.get(place, 0) == before * BLOCK_TOKENS:
                    found[place] = (before + 1) * BLOCK_TOKENS
                    has_more = True
            if not has_more:
                break
        return found

    def note(self, keys: Sequence[int], place: PlaceT) -> None:
        """A prompt with these hashes was sent to `place`."""
        # The first block comes last: without it those behind it are of no use.
        for key in reversed(keys):
            others = [other for other in self._sent.pop(key, ()) if other != place]
            self._sent[key] = (place, *others[: MOST_PLACES - 1])
        while len(self._sent) > self._most_blocks:
            del self._sent[next(iter(self._sent))]
