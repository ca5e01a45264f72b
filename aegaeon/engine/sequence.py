"""One request's tokens, and which blocks hold the keys and values of the first of them."""

from aegaeon._native import Adjustment
from aegaeon.engine.constraints import Constraint
from aegaeon.memory.kv import KvShape
from aegaeon.types import FinishReason, Request


class Sequence:
    """`blocks` are those a forward pass uses, for the first `cached` tokens and those of the pass.

    `offer` is under what its blocks were last offered to other instances (0: never). `adjustment`
    is what it does to its logits, `constraint` says which tokens it may have; of the prompt's
    tokens, the first `scored` have their log-probabilities, or need none.
    """

    __slots__ = (
        *("adjustment", "blocks", "cached", "constraint", "context_tokens", "generated"),
        *("offer", "order", "request", "scored", "shape"),
    )

    def __init__(self, request: Request, shape: KvShape, context_tokens: int, order: int) -> None:
        self.request = request
        self.shape = shape
        self.context_tokens = context_tokens
        self.order = order
        self.generated = list(request.generated_token_ids)
        self.blocks: list[int] = []
        self.cached = 0
        self.offer = 0
        self.adjustment: Adjustment | None = None
        self.constraint: Constraint | None = None
        wants_scores = request.sampling.prompt_logprobs is not None and not self.generated
        self.scored = 1 if wants_scores else len(request.prompt_token_ids)

    @property
    def tokens(self) -> int:
        """Tokens known so far, prompt and generated."""
        return len(self.request.prompt_token_ids) + len(self.generated)

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
        self.blocks = []
        self.cached = 0
        self.offer = 0
