"""Chat templates: a conversation becomes the text of a prompt, in a sandbox.

The environment is the one that templates are written for (that of transformers); templates are
data from a model's directory and get no attribute that could reach out of the sandbox.
"""

import json
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import jinja2
import jinja2.ext
import msgspec
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from aegaeon.errors import CheckpointError, InvalidRequest
from aegaeon.proxy.openai import Message

# What the template is given by us and a client's chat_template_kwargs cannot replace.
_RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"}
)
MAX_SOURCE_CHARS = 1 << 20  # the longest in use have 20,000
# What a template's own expressions raise.
_FAULTS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError)


class Template(Protocol):
    """A model's template, wherever it is rendered."""

    source: str

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        extras: dict[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the prompt, up to where the answer begins, or before what introduces that."""


class ChatTemplate:
    """A model's template, compiled once. `tokens` are names like bos_token with their text."""

    def __init__(self, source: str, tokens: dict[str, str]) -> None:
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, RecursionError, MemoryError, *_FAULTS) as error:
            raise CheckpointError(
                f"the chat template cannot be compiled: {error}; repair chat_template in "
                "tokenizer_config.json"
            ) from None
        self.source = source
        self._tokens = tokens

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        extras: dict[str, Any] | None = None,
        add_generation_prompt: bool = True,
        max_chars: int | None = None,
    ) -> str:
        """Return the prompt, ending where the assistant's answer begins, unless that is to be left.

        Raises InvalidRequest when the template refuses the conversation, or makes more than
        `max_chars` of it. Time and memory are bounded by `rendering` only.
        """
        given = {key: value for key, value in (extras or {}).items() if key not in _RESERVED}
        try:
            pieces = self._template.generate(
                {
                    **self._tokens,
                    **given,
                    "messages": messages,
                    "tools": tools,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
            return _joined(pieces, max_chars)
        except RecursionError:
            raise InvalidRequest(
                "the model's chat template nests too deeply for this conversation"
            ) from None
        except (jinja2.TemplateError, *_FAULTS) as error:
            raise InvalidRequest(
                f"the model's chat template refuses this conversation: {error}"
            ) from None


def _joined(pieces: Iterable[str], max_chars: int | None) -> str:
    parts, total = [], 0
    for piece in pieces:
        parts.append(piece)
        total += len(piece)
        if max_chars is not None and total > max_chars:
            raise InvalidRequest(
                f"the model's chat template makes more than {max_chars} characters of this "
                "conversation; shorten it"
            )
    return "".join(parts)


def messages_for_template(messages: list[Message]) -> list[dict[str, Any]]:
    """Turn checked messages into what templates expect.

    Text parts are joined by line feeds, `developer` becomes `system`, arguments become objects.
    Raises InvalidRequest when a call's arguments are not JSON.
    """
    return [_plain(message) for message in messages]


def read_template(
    directory: Path,
    tokenizer_config: dict[str, Any],
    make: Callable[[str, dict[str, str]], Template] = ChatTemplate,
) -> Template | None:
    """Return the template in a model's directory, made by `make`, or None when it has none.

    Raises CheckpointError when it cannot be compiled, or is too long to be one.
    """
    source = _template_source(directory, tokenizer_config)
    if source is None:
        return None
    if len(source) > MAX_SOURCE_CHARS:
        raise CheckpointError(
            f"the chat template has {len(source)} characters, {MAX_SOURCE_CHARS} are allowed; "
            "repair chat_template in tokenizer_config.json"
        )
    tokens = {
        key: text
        for key in tokenizer_config
        if key.endswith("_token") and (text := token_text(tokenizer_config[key])) is not None
    }
    return make(source, tokens)


def token_text(value: Any) -> str | None:
    """Return a special token's text; tokenizer_config.json has it plain or inside an object."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _template_source(directory: Path, tokenizer_config: dict[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        with file.open(encoding="utf-8", errors="replace") as opened:
            return opened.read(MAX_SOURCE_CHARS + 1)
    value = tokenizer_config.get("chat_template")
    if isinstance(value, list):
        named = {
            entry["name"]: entry["template"]
            for entry in value
            if isinstance(entry, dict) and {"name", "template"} <= entry.keys()
        }
        value = named.get("default")
    return value if isinstance(value, str) else None


def _plain(message: Message) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text or "" for part in content)
    # Clients send null beside tool calls, but many templates search the content as text.
    plain: dict[str, Any] = {"role": role, "content": content or ""}
    for key in ("name", "tool_call_id", "reasoning_content"):
        value = getattr(message, key)
        if value is not None:
            plain[key] = value
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "type": call.type,
                "id": call.id,
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments),
                },
            }
            for call in message.tool_calls
        ]
    return plain


def _arguments(arguments: str | dict[str, Any]) -> Any:
    if isinstance(arguments, dict):
        return arguments
    if not arguments.strip():
        return {}
    try:
        return msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        raise InvalidRequest(
            "a tool call's 'arguments' are not JSON; send an object as text"
        ) from None


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it only passes them on."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_pass_on"), [], [], body).set_lineno(line)

    @staticmethod
    def _pass_on(caller: Any) -> Any:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """jinja's namespace without underscored names, which lead to the interpreter's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # jinja's own signature: a template may store a name `self`.
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class _DictMaker:
    """`dict(...)` in templates, without the type object behind it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _DictMaker()
    environment.globals["namespace"] = _Namespace
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja's own filter escapes HTML, which models were never trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
