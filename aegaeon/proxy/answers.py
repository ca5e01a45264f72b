"""What clients receive: completions and chunks in OpenAI's shapes, as JSON bytes."""

import time
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from aegaeon.types import FinishReason, Quantize


class Usage(msgspec.Struct, frozen=True):
    """Tokens of the prompts, each counted once, and of all choices, the stop token included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Figures(msgspec.Struct, frozen=True, omit_defaults=True):
    """Our own key in answers, which clients pass over: which instance answered."""

    instance: str | None = None


class _Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class _ChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: _Delta
    logprobs: None = None
    finish_reason: FinishReason | None = None


class _ChatMessage(msgspec.Struct, frozen=True):
    content: str | None
    role: str = "assistant"
    refusal: None = None


class _ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: _ChatMessage
    finish_reason: FinishReason
    logprobs: None = None


class _TextChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    logprobs: None = None
    finish_reason: FinishReason | None = None


_Choice = _ChunkChoice | _ChatChoice | _TextChoice


class _Envelope(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str
    created: int
    model: str
    choices: list[_Choice]
    usage: Usage | UnsetType | None = UNSET
    aegaeon: Figures | UnsetType = UNSET


class Text(msgspec.Struct, frozen=True):
    """A finished choice."""

    text: str
    finish_reason: FinishReason


_MARK = "the text of a chunk"
_encode = msgspec.json.Encoder().encode


class Answer:
    """Writes one answer, whole or chunk by chunk; all chunks bear the same id and time."""

    def __init__(
        self,
        kind: Literal["chat", "text"],
        model: str,
        answer_id: str,
        usage_in_chunks: bool = False,
    ) -> None:
        self._is_chat = kind == "chat"
        self._id = answer_id
        self._created = int(time.time())
        self._model = model
        self._usage: UnsetType | None = None if usage_in_chunks else UNSET
        # What stands around the text of a chunk, and around its usage, where it has one.
        self._around: dict[tuple[int, str, bool], list[bytes]] = {}

    def opening(self, index: int) -> bytes:
        """The first chunk of a chat choice, which names the role; nothing for plain text."""
        if not self._is_chat:
            return b""
        choice = _ChunkChoice(index, _Delta(role="assistant", content=""))
        return self._chunk([choice], self._usage, None)

    def piece(
        self,
        index: int,
        text: str,
        finish_reason: FinishReason | None,
        instance: str,
        usage: Usage | None = None,
    ) -> bytes:
        """A chunk with more text of one choice; `usage` is that so far, where asked for."""
        if not text or finish_reason is not None:
            return self._piece(index, text, finish_reason, instance, usage)
        # Those in the middle of a choice, nearly all, differ in their text and usage alone.
        key = index, instance, usage is not None
        around = self._around.get(key)
        if around is None:
            around = self._around[key] = self._split(index, instance, usage)
        if usage is None:
            return around[0] + _encode(text) + around[1]
        return around[0] + _encode(text) + around[1] + _encode(usage) + around[2]

    def _split(self, index: int, instance: str, usage: Usage | None) -> list[bytes]:
        before, _, behind = self._piece(index, _MARK, None, instance, usage).rpartition(
            _encode(_MARK)
        )
        return [before, behind] if usage is None else [before, *behind.split(_encode(usage), 1)]

    def _piece(
        self,
        index: int,
        text: str,
        finish_reason: FinishReason | None,
        instance: str,
        usage: Usage | None,
    ) -> bytes:
        choice: _Choice
        if self._is_chat:
            delta = _Delta(content=text) if text or finish_reason is None else _Delta()
            choice = _ChunkChoice(index, delta, None, finish_reason)
        else:
            choice = _TextChoice(index, text, None, finish_reason)
        return self._chunk([choice], usage or self._usage, instance)

    def usage(self, usage: Usage) -> bytes:
        """The extra chunk that only bears the usage."""
        return self._chunk([], usage, None)

    def whole(self, texts: list[Text], usage: Usage, instance: str) -> bytes:
        """The body of an answer that is not streamed."""
        choices: list[_Choice] = [
            _ChatChoice(index, _ChatMessage(done.text), done.finish_reason)
            if self._is_chat
            else _TextChoice(index, done.text, None, done.finish_reason)
            for index, done in enumerate(texts)
        ]
        name = "chat.completion" if self._is_chat else "text_completion"
        return msgspec.json.encode(self._envelope(name, choices, usage, instance))

    def _chunk(
        self, choices: list[_Choice], usage: Usage | UnsetType | None, instance: str | None
    ) -> bytes:
        name = "chat.completion.chunk" if self._is_chat else "text_completion"
        return frame(msgspec.json.encode(self._envelope(name, choices, usage, instance)))

    def _envelope(
        self,
        name: str,
        choices: list[_Choice],
        usage: Usage | UnsetType | None,
        instance: str | None,
    ) -> _Envelope:
        return _Envelope(
            id=self._id,
            object=name,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
            aegaeon=UNSET if instance is None else Figures(instance),
        )


class Health(msgspec.Struct, frozen=True):
    """The body of GET /health."""

    status: Literal["ok", "unavailable", "draining"]
    open_requests: int
    instances: list["InstanceHealth"]


class InstanceHealth(msgspec.Struct, frozen=True):
    """One instance as it last described itself."""

    id: str
    state: str
    role: str
    device: str
    current: str | None
    resident: tuple[str, ...]
    loading: str | None
    waiting: dict[str, int]
    running: dict[str, int]
    switches: int
    switch_s: float
    stall_s: float
    compute_s: float
    expected_s: float


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """A served model. `quantize` is what its weights have become in memory; `status` says where
    they are now; asking never moves them."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "aegaeon"
    max_model_len: int
    quantize: Quantize
    status: Literal["running", "resident", "loading", "idle"]


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """The body of GET /v1/models."""

    object: str = "list"
    data: list[ModelCard]


DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


def frame(body: bytes) -> bytes:
    """Return one server-sent event with a JSON body, which holds no line feeds."""
    return b"data: " + body + b"\n\n"
