"""How log-probabilities look in answers, in the shapes of chats and of text completions."""

from collections.abc import Callable, Sequence

import msgspec

from aegaeon.proxy.transcript import TokenScore

# The bytes that a token stands for; for a control sign, those of its name.
TokenBytes = Callable[[int], bytes]


class ChatTop(msgspec.Struct, frozen=True):
    """One of the likeliest tokens of a place."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(msgspec.Struct, frozen=True):
    """A token of a chat's answer."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[ChatTop]


class ChatLogProbs(msgspec.Struct, frozen=True):
    """Of a chat's choice, or of a chunk of it."""

    content: list[ChatToken]
    refusal: None = None


class TextLogProbs(msgspec.Struct, frozen=True):
    """Of a text completion's choice, or of a chunk of it: lists of one length. A prompt's first
    token has neither log-probability nor others in its place."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


def chat_log_probs(scores: Sequence[TokenScore], bytes_of: TokenBytes) -> ChatLogProbs:
    """Return what a chat says of `scores`."""
    return ChatLogProbs([_chat_token(score, bytes_of) for score in scores])


def text_log_probs(scores: Sequence[TokenScore], bytes_of: TokenBytes) -> TextLogProbs:
    """Return what a text completion says of `scores`. The token itself is always among the top."""

    def name(token_id: int) -> str:
        return _unique_name(bytes_of(token_id))

    values, tops = [], []
    for score in scores:
        told = score.log_probs
        values.append(None if told is None else told.log_prob)
        top = {} if told is None else {name(token): value for token, value in told.best}
        if told is not None:
            top.setdefault(name(score.token_id), told.log_prob)
        tops.append(top or None)
    return TextLogProbs(
        tokens=[name(score.token_id) for score in scores],
        token_logprobs=values,
        top_logprobs=tops,
        text_offset=[score.offset for score in scores],
    )


def _chat_token(score: TokenScore, bytes_of: TokenBytes) -> ChatToken:
    told = score.log_probs
    assert told is not None, "a chat's tokens are generated"
    top = [ChatTop(*_named(token, value, bytes_of)) for token, value in told.best]
    return ChatToken(*_named(score.token_id, told.log_prob, bytes_of), top)


def _named(token_id: int, value: float, bytes_of: TokenBytes) -> tuple[str, float, list[int]]:
    raw = bytes_of(token_id)
    return raw.decode(errors="replace"), value, list(raw)


def _unique_name(raw: bytes) -> str:
    """Return the token's text; torn characters by their bytes, as names are keys."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
