"""What clients send: the bodies of the two POST routes, decoded and checked.

Unknown fields are ignored; known ones of a wrong type or range, and features that are not built,
are errors that name the field.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar, cast

import msgspec
from msgspec import Meta

from aegaeon.models.references import MAX_NAME_CHARS
from aegaeon.proxy import limits
from aegaeon.proxy.failures import ApiError, invalid, unsupported
from aegaeon.proxy.values import check_values

MAX_CHOICES = 1024
MAX_USER_CHARS = 1024
MAX_TOOLS = 128
COMPLETION_DEFAULT_TOKENS = 16
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")  # no id has two spellings
NAME = "^[a-zA-Z0-9_-]{1,64}$"

Label = Annotated[str, Meta(max_length=MAX_NAME_CHARS)]
_Positive = Annotated[int, Meta(ge=1, le=2**31)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]
_Probability = Annotated[float, Meta(ge=0, le=1)]


class StreamOptions(msgspec.Struct, frozen=True):
    """Extras of a stream. `continuous_usage_stats` puts the usage so far into every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ContentPart(msgspec.Struct, frozen=True):
    """A piece of a message's content; only text is served."""

    type: Label
    text: str | None = None


class FunctionCall(msgspec.Struct, frozen=True):
    """What an assistant called. `arguments` is JSON as text."""

    name: str
    arguments: str | dict[str, Any] = ""


class ToolCall(msgspec.Struct, frozen=True):
    """One call in an assistant's message."""

    function: FunctionCall
    id: str | None = None
    type: Literal["function"] = "function"


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: Label | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class JsonSchema(msgspec.Struct, frozen=True):
    """The schema that an answer must follow."""

    name: Annotated[str, Meta(pattern=NAME)]
    schema: dict[str, Any] | bool | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True):
    """The shape that the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Function(msgspec.Struct, frozen=True, omit_defaults=True):
    """A function that the model may call; `parameters` is the schema of its arguments, an object.
    With `strict`, calls follow it even where the model is free to answer in words."""

    name: Annotated[str, Meta(pattern=NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True):
    """A tool of the model's; only functions are served."""

    type: Literal["function"]
    function: Function


class FunctionName(msgspec.Struct, frozen=True):
    """Which function."""

    name: Label


class AllowedTool(msgspec.Struct, frozen=True):
    """One of those that may be called."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(msgspec.Struct, frozen=True):
    """Which of the tools may be called, or must be."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[AllowedTool], Meta(min_length=1, max_length=MAX_TOOLS)]


class ToolChoice(msgspec.Struct, frozen=True):
    """The one function that must be called, or those that may be: what `type` is called."""

    type: Literal["function", "allowed_tools"] = "function"
    function: FunctionName | None = None
    allowed_tools: AllowedTools | None = None

    @property
    def names(self) -> list[str]:
        """What may be called."""
        if self.type == "function":
            return [] if self.function is None else [self.function.name]
        allowed = [] if self.allowed_tools is None else self.allowed_tools.tools
        return [tool.function.name for tool in allowed]

    @property
    def is_forced(self) -> bool:
        """Whether something must be called."""
        return self.allowed_tools is None or self.allowed_tools.mode == "required"


class Body(msgspec.Struct, frozen=True, kw_only=True):
    """The fields both routes share. None means "not given" everywhere, as clients send null."""

    model: Label
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: _Probability | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: _Probability | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    max_tokens: _Positive | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    user: Annotated[str, Meta(max_length=MAX_USER_CHARS)] | None = None
    metadata: dict[str, Any] | None = None

    def stops(self) -> tuple[str, ...]:
        """Return the stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def biases(self) -> tuple[tuple[int, float], ...]:
        """Return what is added to the logits of tokens, by id. Raises ApiError."""
        given = self.logit_bias or {}
        limits.check_count("logit_bias", len(given), limits.MAX_BIASES, "tokens")
        wrong = next((key for key in given if not _TOKEN_ID.fullmatch(key)), None)
        if wrong is not None:
            text = f"'logit_bias' has {wrong[:20]!r}; its keys are token ids, without zeros before"
            raise invalid("logit_bias", text)
        return tuple((int(key), added) for key, added in given.items())

    @property
    def asked_logprobs(self) -> int | None:
        """How many tokens beside the chosen one come with log-probabilities; None: none at all."""
        raise NotImplementedError


class ChatBody(Body, frozen=True, kw_only=True):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: _Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    modalities: list[str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def asked_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(Body, frozen=True, kw_only=True):
    """The body of POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    max_tokens: Annotated[int, Meta(ge=0, le=2**31)] | None = None
    suffix: str | None = None
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None

    @property
    def asked_logprobs(self) -> int | None:
        return self.logprobs

    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        """Return the prompts one by one, each as text or as token ids."""
        if isinstance(self.prompt, str):
            return (self.prompt,)
        # Not part by part: there may be a million.
        kinds = set(map(type, self.prompt))
        if len(kinds) > 1:
            raise invalid("prompt", "'prompt' mixes text and token ids; send one kind")
        if kinds == {int}:
            return (tuple(cast("list[int]", self.prompt)),)
        if len(self.prompt) * (self.n or 1) > MAX_CHOICES:
            text = f"prompts times n is over {MAX_CHOICES}; send fewer at a time"
            raise invalid("prompt", text)
        if kinds == {str}:
            return tuple(cast("list[str]", self.prompt))
        return tuple(map(tuple, cast("list[list[int]]", self.prompt)))


_Body = TypeVar("_Body")
_AT = re.compile(r"^(.*) - at `(?:key in )?\$\.?(.*)`$", re.DOTALL)
_TREES = (
    *("tools", "tool_choice", "functions", "function_call"),
    *("response_format", "chat_template_kwargs"),
)
_MISSING = re.compile(r"missing required field `([^`]*)`")


def parse_chat(raw: bytes) -> ChatBody:
    """Decode and check the body of a chat completion. Raises ApiError."""
    body = decode_body(raw, ChatBody)
    _check_shared(body)
    check_messages(body.messages)
    check_trees(body, _TREES)
    _check_chat_features(body)
    return body


def parse_completion(raw: bytes) -> CompletionBody:
    """Decode and check the body of a text completion. Raises ApiError."""
    body = decode_body(raw, CompletionBody)
    _check_shared(body)
    if body.suffix:
        raise unsupported("suffix")
    if body.best_of is not None and body.best_of > 1:
        raise unsupported("best_of")
    if body.max_tokens == 0 and not body.echo:
        raise invalid("max_tokens", "'max_tokens' 0 generates nothing; it needs 'echo': true")
    prompts = body.prompts()
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise invalid("prompt", "'prompt' is empty; send at least one character or token id")
    return body


def decode_body(raw: bytes, kind: type[_Body]) -> _Body:
    """Return the JSON body `raw` as a `kind`. Raises ApiError that names the wrong field."""
    check_values([raw])
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, "invalid_json", f"the body is not JSON: {error}") from None
    except RecursionError:
        raise ApiError(400, "invalid_json", "the body is nested too deeply") from None


def _explain(text: str) -> ApiError:
    found = _AT.match(text)
    fact, path = (found[1], found[2]) if found else (text, "")
    missing = _MISSING.search(fact)
    if missing:
        path = f"{path}.{missing[1]}" if path else missing[1]
        return ApiError(400, "missing_required_parameter", f"'{path}' is missing", path)
    return invalid(path or None, f"'{path}': {fact}" if path else fact)


def _check_shared(body: Body) -> None:
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "'stream_options' is only allowed with 'stream': true")
    limits.check_stops(body.stops())
    limits.check_tree("metadata", body.metadata)
    body.biases()


def check_messages(messages: list[Message]) -> None:
    """Raise ApiError for messages that are too much of anything, or that nobody could send."""
    limits.check_count("messages", len(messages), limits.MAX_MESSAGES, "messages")
    parts = sum(len(one.content) for one in messages if isinstance(one.content, list))
    limits.check_count("messages", parts, limits.MAX_PARTS, "parts of content")
    calls = [call for one in messages for call in one.tool_calls or ()]
    limits.check_count("messages", len(calls), limits.MAX_CALLS, "tool calls")
    arguments = [call.function.arguments for call in calls]
    for one in arguments:
        limits.check_tree("messages", one)
    check_values([one.encode() for one in arguments if isinstance(one, str)], "messages")
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]")


def check_trees(body: msgspec.Struct, names: Sequence[str]) -> None:
    """Raise ApiError where one of these fields is too deep or too large, or a schema in it."""
    for name in names:
        value = msgspec.to_builtins(getattr(body, name))
        limits.check_tree(name, value)
        limits.check_schemas(name, value)


def _check_chat_features(body: ChatBody) -> None:
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs", "'top_logprobs' is only allowed with 'logprobs': true")
    if body.functions:
        raise unsupported("functions")
    _check_tools(body)
    _check_format(body)
    if body.modalities is not None and body.modalities != ["text"]:
        raise unsupported("modalities")


def _check_tools(body: ChatBody) -> None:
    tools, choice = body.tools or [], body.tool_choice
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise invalid("tools", "'tools' has two functions of one name")
    for index, tool in enumerate(tools):
        parameters = tool.function.parameters
        if parameters is not None and parameters.get("type", "object") != "object":
            place = f"tools[{index}].function.parameters"
            raise invalid(place, f"'{place}' must be a schema of an object")
    if not tools and choice not in (None, "none", "auto"):
        raise invalid("tool_choice", "'tool_choice' is only allowed with 'tools'")
    if isinstance(choice, ToolChoice):
        _check_choice(choice, names)


def _check_choice(choice: ToolChoice, names: list[str]) -> None:
    if not choice.names:
        place = f"tool_choice.{choice.type}"
        raise ApiError(400, "missing_required_parameter", f"'{place}' is missing", place)
    unknown = next((name for name in choice.names if name not in names), None)
    if unknown is not None:
        raise invalid("tool_choice", f"'tool_choice' names {unknown!r}, which is none of 'tools'")


def _check_format(body: ChatBody) -> None:
    asked = body.response_format
    if asked is None or asked.type == "text":
        return
    has_schema = asked.json_schema is not None and asked.json_schema.schema is not None
    if asked.type == "json_schema" and not has_schema:
        place = "response_format.json_schema"
        raise invalid(place, f"'{place}' has no 'schema'")
    if body.ignore_eos:
        raise invalid("ignore_eos", "JSON ends where it is complete; leave 'ignore_eos' out")
    if body.tools and body.tool_choice != "none":
        text = "an answer is either JSON or calls; leave 'response_format' or 'tools' out"
        raise invalid("response_format", text)


def _check_message(message: Message, where: str) -> None:
    if message.content is None and not (message.role == "assistant" and message.tool_calls):
        raise invalid(f"{where}.content", f"'{where}.content' is missing")
    if message.tool_calls and message.role != "assistant":
        raise invalid(f"{where}.tool_calls", "only the assistant's messages have 'tool_calls'")
    if not isinstance(message.content, list):
        return
    for index, part in enumerate(message.content):
        place = f"{where}.content[{index}]"
        if part.type != "text":
            text = f"content of type '{part.type}' is not supported; send text"
            raise ApiError(400, "unsupported_parameter", text, f"{place}.type")
        if part.text is None:
            raise invalid(f"{place}.text", f"'{place}.text' is missing")
