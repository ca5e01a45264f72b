"""Text to token ids and back for clients that count or send tokens: /tokenize and /detokenize, in
vLLM's shapes."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from aegaeon.proxy.asked import (
    chars_of,
    check_length,
    check_token_ids,
    check_tokens,
    ids_of,
)
from aegaeon.proxy.chat import messages_for_template
from aegaeon.proxy.failures import invalid
from aegaeon.proxy.grammars import for_template
from aegaeon.proxy.openai import (
    ChatBody,
    Label,
    Message,
    Tool,
    check_messages,
    check_trees,
    decode_body,
)
from aegaeon.proxy.tokenizer import TextModel
from aegaeon.types import ModelSpec


class TokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    """The body of POST /tokenize: a prompt or a conversation. Special tokens that the tokenizer
    adds by itself come to a prompt unless told otherwise; a chat template writes its own."""

    model: Label
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    """The body of POST /detokenize."""

    model: Label
    tokens: list[int]


class Tokenized(msgspec.Struct, frozen=True):
    """The answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: tuple[int, ...]
    token_strs: list[str] | None = None


class Detokenized(msgspec.Struct, frozen=True):
    """The answer of /detokenize: the text, control signs among it."""

    prompt: str


def parse_tokenize(raw: bytes) -> TokenizeBody:
    """Decode and check the body of /tokenize. Raises ApiError."""
    body = decode_body(raw, TokenizeBody)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("prompt", "send either 'prompt' or 'messages'")
    check_messages(body.messages or [])
    check_trees(body, ("tools", "chat_template_kwargs"))
    return body


def _shown(body: TokenizeBody) -> list[dict[str, Any]] | None:
    if not body.tools:
        return None
    return for_template(ChatBody(model=body.model, messages=[], tools=body.tools))


def parse_detokenize(raw: bytes) -> DetokenizeBody:
    """Decode the body of /detokenize. Raises ApiError."""
    return decode_body(raw, DetokenizeBody)


def tokenize(spec: ModelSpec, text: TextModel, body: TokenizeBody) -> Tokenized:
    """Return the ids of the body's text; takes milliseconds. Raises ApiError, InvalidRequest."""
    if body.prompt is not None:
        ids = ids_of(spec, text, body.prompt, "prompt", body.add_special_tokens is not False)
    else:
        messages = messages_for_template(body.messages or [])
        check_length(spec, text, chars_of(messages), "messages")
        rendered = text.render_chat(
            messages,
            _shown(body),
            body.chat_template_kwargs,
            add_generation_prompt=body.add_generation_prompt is not False,
        )
        ids = ids_of(spec, text, rendered, "messages", bool(body.add_special_tokens))
    names = [text.token_name(token) for token in ids] if body.return_token_strs else None
    return Tokenized(len(ids), spec.context_tokens, ids, names)


def chat_ids(
    spec: ModelSpec,
    text: TextModel,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    extras: dict[str, Any] | None,
) -> tuple[int, ...]:
    """Return the ids of a conversation that is to be answered; the template may have made a lot of
    it. Raises ApiError, and as `render_chat`."""
    rendered = text.render_chat(messages, tools, extras)
    return ids_of(spec, text, rendered, "messages", add_special_tokens=False)


def detokenize(spec: ModelSpec, text: TextModel, body: DetokenizeBody) -> Detokenized:
    """Return the text of the body's ids. Raises ApiError."""
    check_tokens(spec, len(body.tokens), "tokens")
    check_token_ids(spec, body.tokens, "tokens")
    return Detokenized(text.decode(tuple(body.tokens), keep_special=True))
