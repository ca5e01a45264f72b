"""How a request is to be sampled, and what fits into a model: what the client said over the model's
own defaults, within the model's bounds."""

import hashlib
import secrets
from collections.abc import Sequence

import msgspec

from aegaeon.errors import ContextLengthExceeded
from aegaeon.proxy.failures import ApiError, as_api_error, invalid
from aegaeon.proxy.generation import Generation
from aegaeon.proxy.openai import Body, CompletionBody
from aegaeon.proxy.tokenizer import TextModel
from aegaeon.proxy.transcript import Echo
from aegaeon.sampling import SamplingParams
from aegaeon.types import ModelSpec

# Characters beyond the longest token's, for tokenizers and templates that drop some.
_SLACK = 4


class Prompt(msgspec.Struct, frozen=True):
    """A tokenised prompt and how much is to follow; only a default gives way to the context."""

    token_ids: tuple[int, ...]
    asked: int
    is_firm: bool
    echo: Echo | None = None


def max_tokens(spec: ModelSpec, prompt: Prompt, param: str) -> int:
    """Return how much to generate."""
    token_ids, asked = prompt.token_ids, prompt.asked
    if not token_ids:
        raise invalid(param, f"'{param}' has no tokens; send some text")
    check_token_ids(spec, token_ids, param)
    room = spec.context_tokens - len(token_ids)
    needed = asked if prompt.is_firm else 1
    if needed > room:
        raise _too_long(
            f"the context of {spec.id} is {spec.context_tokens} tokens, but the prompt has "
            f"{len(token_ids)} and {needed} more are to be generated; shorten one of them",
            param,
        )
    return min(asked, room)


def check_token_ids(spec: ModelSpec, token_ids: Sequence[int], param: str) -> None:
    """Raise ApiError where an id is not one of the model's."""
    wrong = next((t for t in token_ids if not 0 <= t < spec.vocab_tokens), None)
    if wrong is not None:
        text = f"token id {wrong} is not in the vocabulary of {spec.vocab_tokens} tokens"
        raise invalid(param, text)


def check_length(spec: ModelSpec, text: TextModel, chars: int, param: str) -> None:
    """Refuse what cannot fit by far: to tokenise megabytes takes seconds of a processor."""
    if chars > _SLACK * spec.context_tokens * text.longest_token_chars:
        raise _too_long(
            f"the context of {spec.id} is {spec.context_tokens} tokens, but the prompt has {chars} "
            "characters; shorten it",
            param,
        )


def _too_long(message: str, param: str) -> ApiError:
    exceeded = as_api_error(ContextLengthExceeded(message))
    return ApiError(exceeded.status, exceeded.code, exceeded.message, param)


def sampling_of(body: Body, spec: ModelSpec, text: TextModel) -> SamplingParams:
    """Merge what the client gave over the model's own defaults; a missing seed is drawn."""
    values = msgspec.structs.asdict(text.defaults)
    biases = body.biases()
    wrong = next((token for token, _ in biases if token >= spec.vocab_tokens), None)
    if wrong is not None:
        text_of_it = f"'logit_bias' has token {wrong}; the vocabulary has {spec.vocab_tokens}"
        raise invalid("logit_bias", text_of_it)
    for name in values:
        given = getattr(body, name)
        if given is not None:
            values[name] = given
    if values["top_p"] == 0:
        # No probability at all still leaves the best token.
        values.update(top_p=1.0, top_k=1)
    values["top_k"] = max(values["top_k"], 0)
    seed = secrets.randbits(63) if body.seed is None else body.seed % 2**63
    return SamplingParams(
        **values,
        seed=seed,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=biases,
        logprobs=body.asked_logprobs,
        prompt_logprobs=body.logprobs if isinstance(body, CompletionBody) and body.echo else None,
    )


def child_seed(seed: int, choice: int) -> int:
    """Choice 0 draws as if it were alone; the others from seeds of their own."""
    if choice == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{choice}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 2**63


def held_to(grammar: str, generation: Generation) -> Generation:
    """Return the generation with a grammar that its tokens follow; empty: none."""
    sampling = msgspec.structs.replace(generation.sampling, grammar=grammar)
    return msgspec.structs.replace(generation, sampling=sampling)
