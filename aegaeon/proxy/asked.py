"""How a request is to be sampled, and what fits into a model: what the client said over the model's
own defaults, within the model's bounds."""

import hashlib
import secrets
from collections.abc import Sequence
from typing import Any

import msgspec

from aegaeon.errors import ContextLengthExceeded
from aegaeon.proxy.failures import ApiError, as_api_error, invalid
from aegaeon.proxy.generation import Generation
from aegaeon.proxy.openai import Body, ChatBody, CompletionBody, StreamOptions
from aegaeon.proxy.tokenizer import TextModel
from aegaeon.proxy.traces import Value, asked_of
from aegaeon.proxy.transcript import Echo
from aegaeon.sampling import SamplingParams
from aegaeon.types import ModelSpec

# Of characters, for tokenizers and templates that drop some; of tokens, for who wants to count.
_SLACK = 4
_PIECE_CHARS = 16  # for each token of the context; ordinary text has fewer


class Prompt(msgspec.Struct, frozen=True):
    """A tokenised prompt and how much is to follow, or nothing; only a default gives way to the
    context."""

    token_ids: tuple[int, ...]
    asked: int
    is_firm: bool
    echo: Echo | None = None


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer needs of the body that asked for it, which may have megabytes and is let go;
    by the body's own names."""

    model: str
    is_chat: bool
    n: int
    stream: bool
    stream_options: StreamOptions | None
    stops: tuple[str, ...]
    logprobs: int | None
    named: dict[str, Value]  # for traces


def kept_of(body: ChatBody | CompletionBody) -> Asked:
    """Return what is kept of a checked body."""
    return Asked(
        model=body.model,
        is_chat=isinstance(body, ChatBody),
        n=body.n or 1,
        stream=bool(body.stream),
        stream_options=body.stream_options,
        stops=body.stops(),
        logprobs=body.asked_logprobs,
        named=asked_of(body),
    )


def max_tokens(spec: ModelSpec, prompt: Prompt, param: str) -> int:
    """Return how much to generate: one token, which nobody gets, where the prompt is but scored;
    that one needs no room."""
    token_ids, asked = prompt.token_ids, prompt.asked
    if not token_ids:
        raise invalid(param, f"'{param}' has no tokens; send some text")
    room = spec.context_tokens - len(token_ids)
    needed = asked if prompt.is_firm else 1
    if needed > room:
        raise _too_long(
            f"the context of {spec.id} is {spec.context_tokens} tokens, but the prompt has "
            f"{len(token_ids)} and {needed} more are to be generated; shorten one of them",
            param,
        )
    check_token_ids(spec, token_ids, param)
    return max(min(asked, room), 1)


def check_token_ids(spec: ModelSpec, token_ids: Sequence[int], param: str) -> None:
    """Raise ApiError where an id is not one of the model's."""
    # Not one by one, where all are right.
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < spec.vocab_tokens):
        wrong = next(t for t in token_ids if not 0 <= t < spec.vocab_tokens)
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


def check_tokens(spec: ModelSpec, tokens: int, param: str) -> None:
    """Refuse what is longer by far than all that a request could have."""
    if tokens > _SLACK * spec.context_tokens:
        raise _too_long(
            f"the context of {spec.id} is {spec.context_tokens} tokens, but there are at least "
            f"{tokens} here; send less",
            param,
        )


def ids_of(
    spec: ModelSpec, text: TextModel, chars: str, param: str, add_special_tokens: bool
) -> tuple[int, ...]:
    """Return the ids of `chars`; takes milliseconds. Raises ApiError for what cannot fit by far,
    as soon as that shows: before all of it is tokenised."""
    check_length(spec, text, len(chars), param)
    piece = _PIECE_CHARS * spec.context_tokens
    tokens = 0
    for at in range(0, len(chars) if len(chars) > piece else 0, piece):
        tokens += len(text.encode(chars[at : at + piece], add_special_tokens=False))
        check_tokens(spec, tokens, param)
    ids = text.encode(chars, add_special_tokens)
    if len(text.vocabulary) > spec.vocab_tokens:
        check_token_ids(spec, ids, param)  # of a token that was added, without weights
    return ids


def chars_of(messages: Sequence[dict[str, Any]]) -> int:
    """Return how many characters a template is given, about."""
    count = 0
    for message in messages:
        count += sum(len(value) for value in message.values() if isinstance(value, str))
        if "tool_calls" in message:
            count += len(msgspec.json.encode(message["tool_calls"]))
    return count


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


def held_to(grammar: str, generation: Generation, kept_bytes: int = 0) -> Generation:
    """Return the generation with a grammar that its tokens follow, empty: none; for its answer
    `kept_bytes` are kept."""
    sampling = msgspec.structs.replace(generation.sampling, grammar=grammar)
    return msgspec.structs.replace(generation, sampling=sampling, kept_bytes=kept_bytes)
