"""The records of how tokens are drawn, and of how likely they were.

Only data: csrc/ops/sampling.h draws, csrc/ops/adjustment.h changes logits before that.
"""

import msgspec


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the next token is drawn. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off.

    The draw for a request's k-th token depends on (`seed`, k), its own logits and its own tokens,
    nothing else. Penalties and `logit_bias`, (token, added), change the logits before that;
    `grammar` (empty: none, else one of llguidance) says which tokens may come at all. With
    `logprobs` the tokens come with their log-probabilities and those of so many others, and with
    `prompt_logprobs` so do those of the prompt, from the second on: those of the model's logits, as
    they were before anything changed them.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: str = ""
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def adjusts_logits(self) -> bool:
        """Whether logits are changed before a draw by what the sequence has, or the client adds."""
        return bool(
            self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1.0
            or self.logit_bias
        )


class TokenLogProbs(msgspec.Struct, frozen=True, array_like=True):
    """Of a token, the natural log-probability, and ids and log-probabilities of the likeliest in
    its place, the likeliest first; the token itself is among them only where it is one."""

    log_prob: float
    best: tuple[tuple[int, float], ...] = ()


class PromptScores(msgspec.Struct, frozen=True, tag=True):
    """Instance to proxy: log-probabilities of tokens of a prompt, those at `position` and behind.

    They come in order, before the request's first token; the prompt's first token has none.
    """

    request_id: str
    attempt: int
    position: int
    log_probs: tuple[TokenLogProbs, ...]
