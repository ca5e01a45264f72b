"""One request's tokens, and which blocks hold the keys and values of the first of them."""

from aegaeon._native import Adjustment
from aegaeon.engine.constraints import Constraint
from aegaeon.memory.kv import BLOCK_TOKENS, KvShape
from aegaeon.memory.prefixes import Chain, Held
from aegaeon.types import FinishReason, KvHandle, Request


class Sequence:
    """`held` has the blocks a forward pass uses, for the first `cached` tokens and those of the
    pass; `chain` names their content, where others may see them (`is_shareable`). Of the cached
    tokens `sound` ones are known to have finite keys and values; `is_unsure` while no logits have
    told of what was run last.

    `found` tokens were cached when it began, as others had left them, and nobody has been told yet.
    `offer` is under what its blocks were last offered to other instances (0: never); `is_apart`
    from when it is to go there: it computes no more, and yields to nobody. `is_adopted` is one that
    came from there. `adjustment` is what it does to its logits, `constraint` says which tokens it
    may have; of the prompt's tokens, the first `scored` have their log-probabilities, or need none.
    """

    __slots__ = (
        *("adjustment", "cached", "chain", "constraint", "context_tokens", "found", "generated"),
        *("held", "is_adopted", "is_apart", "is_shareable", "is_unsure", "offer", "order"),
        *("request", "scored", "shape", "sound"),
    )

    def __init__(self, request: Request, shape: KvShape, context_tokens: int, order: int) -> None:
        self.request = request
        self.shape = shape
        self.context_tokens = context_tokens
        self.order = order
        self.generated = list(request.generated_token_ids)
        self.chain = Chain(b"", self.slice)
        self.is_shareable = self.is_unsure = False
        self.held = Held()
        self.cached = self.sound = self.found = 0
        self.offer = 0
        self.is_apart = self.is_adopted = False
        self.adjustment: Adjustment | None = None
        self.constraint: Constraint | None = None
        wants_scores = request.sampling.prompt_logprobs is not None and not self.generated
        self.scored = 1 if wants_scores else len(request.prompt_token_ids)

    @property
    def tokens(self) -> int:
        """Tokens known so far, prompt and generated."""
        return len(self.request.prompt_token_ids) + len(self.generated)

    @property
    def blocks(self) -> list[int]:
        """The blocks of `held`."""
        return self.held.blocks

    def begin(self, identity: bytes) -> None:
        """What is named so runs it from here on. Where something else has before, another instance
        or weights that have been replaced, no other sequence gets to see its blocks."""
        if not self.cached:
            if self.chain.identity != identity:
                self.chain = Chain(identity, self.slice)
            self.is_shareable = True
        elif self.chain.identity != identity:
            self.is_shareable = False

    def adopt(self, kv: KvHandle) -> None:
        """Its blocks hold what another instance computed, as `kv` says."""
        self.is_adopted = True
        self.cached = kv.cached_tokens
        if kv.identity:
            self.chain = Chain(kv.identity, self.slice)
            self.is_shareable = True
            self.sound = kv.cached_tokens

    @property
    def sound_identity(self) -> bytes:
        """What computed its keys and values, where all of them are sound and of one mind."""
        return self.chain.identity if self.is_shareable and self.sound == self.cached else b""

    @property
    def findable_tokens(self) -> int:
        """How many tokens need not be run where others have left their keys and values: all but
        the last, of which the next one comes, and those that are to tell how likely the next is."""
        return self.tokens - 1 if self.is_scored else self.scored - 1

    @property
    def whole_blocks(self) -> int:
        """How many blocks, from the first on, others may see."""
        return self.sound // BLOCK_TOKENS if self.is_shareable else 0

    def slice(self, start: int, stop: int) -> list[int]:
        """Return the token ids at positions start .. stop - 1."""
        prompt = self.request.prompt_token_ids
        made = self.generated[max(start - len(prompt), 0) : max(stop - len(prompt), 0)]
        return [*prompt[start:stop], *made]

    @property
    def is_scored(self) -> bool:
        """Whether all of the prompt's tokens have the log-probabilities that were asked for."""
        return self.scored >= len(self.request.prompt_token_ids)

    def append(self, token_id: int) -> FinishReason | None:
        """Take a new token and say whether, and why, it is the last."""
        self.generated.append(token_id)
        if self.adjustment is not None:
            self.adjustment.count(token_id)
        if token_id in self.request.stop_token_ids:
            return "stop"
        if len(self.generated) >= self.request.max_tokens or self.tokens >= self.context_tokens:
            return "length"
        if self.constraint is not None:
            self.constraint.push(token_id)
        return None

    def forget_kv(self) -> None:
        """Nothing of it is cached any more; its tokens stay."""
        self.is_unsure = False
        self.held = Held()
        self.cached = self.sound = self.found = 0
        self.offer = 0
