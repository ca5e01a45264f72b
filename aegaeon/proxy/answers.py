"""What clients receive: completions and chunks in OpenAI's shapes, as JSON bytes."""

import time
from typing import Generic, Literal, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from aegaeon.measures import Waited
from aegaeon.proxy.logprobs import (
    ChatLogProbs,
    TextLogProbs,
    TokenBytes,
    chat_log_probs,
    text_log_probs,
)
from aegaeon.proxy.tools import Call
from aegaeon.proxy.transcript import AnswerFinish, Piece, TokenScore
from aegaeon.specs import Priority
from aegaeon.types import Quantize


class PromptDetails(msgspec.Struct, frozen=True):
    """Of the prompts' tokens: those that no choice had to prefill."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Tokens of the prompts, each counted once, and of all choices, the stop token included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Figures(msgspec.Struct, frozen=True):
    """Our own key in answers, which clients pass over: which instance answered; at the end of a
    choice also what it waited for, and how much of its prompt was not prefilled again. Of a whole
    answer's choices it is the longest wait of each kind."""

    instance: str
    queue_ms: float | UnsetType = UNSET
    switch_ms: float | UnsetType = UNSET
    switches: int | UnsetType = UNSET
    preempted_ms: float | UnsetType = UNSET
    cached_tokens: int | UnsetType = UNSET


def figures(instance: str, waited: Waited, cached_tokens: int) -> Figures:
    """Return the figures of what has ended."""
    return Figures(
        instance,
        _milliseconds(waited.queue_s),
        _milliseconds(waited.switch_s),
        waited.switches,
        _milliseconds(waited.preempted_s),
        cached_tokens,
    )


def _milliseconds(seconds: float) -> float:
    return round(1e3 * seconds, 1)


class MadeFunction(msgspec.Struct, frozen=True):
    """A function that was called; `arguments` is JSON as text."""

    name: str
    arguments: str


class MadeCall(msgspec.Struct, frozen=True):
    """One call of a tool."""

    id: str
    type: Literal["function"]
    function: MadeFunction


class _CallDelta(msgspec.Struct, frozen=True):
    index: int
    id: str
    type: Literal["function"]
    function: MadeFunction


class _Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[_CallDelta] | UnsetType = UNSET


class _ChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: _Delta
    logprobs: ChatLogProbs | None = None
    finish_reason: AnswerFinish | None = None


class ChatMessage(msgspec.Struct, frozen=True):
    """What the assistant said, or called."""

    content: str | None
    role: str = "assistant"
    refusal: None = None
    tool_calls: list[MadeCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    """One answer to a conversation."""

    index: int
    message: ChatMessage
    finish_reason: AnswerFinish
    logprobs: ChatLogProbs | None = None


class TextChoice(msgspec.Struct, frozen=True):
    """One way in which a text goes on."""

    index: int
    text: str
    logprobs: TextLogProbs | None = None
    finish_reason: AnswerFinish | None = None


_Choice = _ChunkChoice | ChatChoice | TextChoice


_C = TypeVar("_C")


class Answered(msgspec.Struct, Generic[_C], frozen=True, kw_only=True):
    """An answer, whole or a chunk of it."""

    id: str
    object: str
    created: int
    model: str
    choices: list[_C]
    usage: Usage | UnsetType | None = UNSET
    aegaeon: Figures | UnsetType = UNSET


class Text(msgspec.Struct, frozen=True):
    """A finished choice."""

    text: str
    finish_reason: AnswerFinish
    scores: tuple[TokenScore, ...] = ()
    calls: tuple[Call, ...] = ()


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
        bytes_of: TokenBytes | None = None,
    ) -> None:
        """With `bytes_of`, which names tokens, the choices have log-probabilities."""
        self._is_chat = kind == "chat"
        self._id = answer_id
        self._created = int(time.time())
        self._model = model
        self._usage: UnsetType | None = None if usage_in_chunks else UNSET
        self._bytes_of = bytes_of
        # What stands around the text of a chunk, and around its usage, where it has one.
        self._around: dict[tuple[int, str, bool], list[bytes]] = {}

    def opening(self, index: int) -> bytes:
        """The first chunk of a chat choice, which names the role; nothing for plain text."""
        if not self._is_chat:
            return b""
        choice = _ChunkChoice(index, _Delta(role="assistant", content=""))
        return self._chunk([choice], self._usage, None)

    def piece(self, piece: Piece, usage: Usage | None = None) -> bytes:
        """A chunk with more text of one choice; `usage` is that so far, where asked for."""
        if not piece.text or piece.finish_reason is not None or piece.scores or piece.calls:
            return self._piece(piece, usage)
        # Those in the middle of a choice, nearly all, differ in their text and usage alone.
        key = piece.index, piece.instance, usage is not None
        around = self._around.get(key)
        if around is None:
            around = self._around[key] = self.around(piece.index, piece.instance, usage)
        if usage is None:
            return around[0] + _encode(piece.text) + around[1]
        return around[0] + _encode(piece.text) + around[1] + _encode(usage) + around[2]

    def around(self, index: int, instance: str, usage: Usage | None) -> list[bytes]:
        """What stands before and behind the text of a chunk in the middle of a choice, as a JSON
        string; with `usage`, what stands behind it as two: this is between them."""
        marked = self._piece(Piece(index, _MARK, 0, None, instance), usage)
        before, _, behind = marked.rpartition(_encode(_MARK))
        return [before, behind] if usage is None else [before, *behind.split(_encode(usage), 1)]

    def _piece(self, piece: Piece, usage: Usage | None) -> bytes:
        text, finish = piece.text, piece.finish_reason
        choice: _Choice
        if self._is_chat:
            calls = [_CallDelta(call.index, *_called(call)) for call in piece.calls]
            is_said = bool(text) or (finish is None and not calls)
            delta = _Delta(content=text if is_said else UNSET, tool_calls=calls or UNSET)
            choice = _ChunkChoice(piece.index, delta, self._of_chat(piece.scores, True), finish)
        else:
            choice = TextChoice(piece.index, text, self._of_text(piece.scores, True), finish)
        ours = Figures(piece.instance)
        if finish is not None:
            ours = figures(piece.instance, piece.waited, piece.cached_tokens)
        return self._chunk([choice], usage or self._usage, ours)

    def usage(self, usage: Usage) -> bytes:
        """The extra chunk that only bears the usage."""
        return self._chunk([], usage, None)

    def whole(self, texts: list[Text], usage: Usage, ours: Figures) -> bytes:
        """The body of an answer that is not streamed."""
        choices = [self._choice(index, done) for index, done in enumerate(texts)]
        name = "chat.completion" if self._is_chat else "text_completion"
        return msgspec.json.encode(self._envelope(name, choices, usage, ours))

    def _choice(self, index: int, done: Text) -> _Choice:
        if self._is_chat:
            calls = [MadeCall(*_called(call)) for call in done.calls]
            content = None if calls and not done.text else done.text
            message = ChatMessage(content, tool_calls=calls or UNSET)
            return ChatChoice(index, message, done.finish_reason, self._of_chat(done.scores))
        return TextChoice(index, done.text, self._of_text(done.scores), done.finish_reason)

    def _of_chat(
        self, scores: tuple[TokenScore, ...], is_chunk: bool = False
    ) -> ChatLogProbs | None:
        if self._bytes_of is None or (is_chunk and not scores):
            return None
        return chat_log_probs(scores, self._bytes_of)

    def _of_text(
        self, scores: tuple[TokenScore, ...], is_chunk: bool = False
    ) -> TextLogProbs | None:
        if self._bytes_of is None or (is_chunk and not scores):
            return None
        return text_log_probs(scores, self._bytes_of)

    def _chunk(
        self, choices: list[_Choice], usage: Usage | UnsetType | None, ours: Figures | None
    ) -> bytes:
        name = "chat.completion.chunk" if self._is_chat else "text_completion"
        return frame(msgspec.json.encode(self._envelope(name, choices, usage, ours)))

    def _envelope(
        self,
        name: str,
        choices: list[_Choice],
        usage: Usage | UnsetType | None,
        ours: Figures | None,
    ) -> Answered[_Choice]:
        return Answered(
            id=self._id,
            object=name,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
            aegaeon=UNSET if ours is None else ours,
        )


def _called(call: Call) -> tuple[str, Literal["function"], MadeFunction]:
    return call.id, "function", MadeFunction(call.name, call.arguments)


class Health(msgspec.Struct, frozen=True):
    """The body of GET /health."""

    status: Literal["ok", "unavailable", "draining"]
    open_requests: int
    instances: list["InstanceHealth"]
    complaint: str | None = None  # what is wrong with the configuration


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
    looked_up_tokens: int
    found_tokens: int
    evicted_blocks: int


class Ready(msgspec.Struct, frozen=True):
    """The body of GET /health/ready; `reasons` say what keeps it from being ready."""

    status: Literal["ready", "unready"]
    reasons: tuple[str, ...]


class Live(msgspec.Struct, frozen=True):
    """The body of GET /health/live."""

    status: Literal["live"] = "live"


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """A served model. `quantize` is what its weights have become in memory; `status` says what
    is done with them now, `tier` the nearest place where they are, `progress` what share of a load
    has come; asking never moves them."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "aegaeon"
    max_model_len: int
    quantize: Quantize
    status: Literal["running", "resident", "loading", "idle", "draining"]
    tier: Literal["device", "host", "disk"]
    progress: float | None = None
    aliases: tuple[str, ...] = ()
    pinned: bool = False
    priority: Priority = "normal"
    idle_s: float = 0.0


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """The body of GET /v1/models."""

    object: str = "list"
    data: list[ModelCard]


DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


def frame(body: bytes) -> bytes:
    """Return one server-sent event with a JSON body, which holds no line feeds."""
    return b"data: " + body + b"\n\n"
