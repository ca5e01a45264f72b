"""Tool calls: how families of models write them, as grammars to be held to and as text to be read.

Which way a model has is told by its chat template, which taught it.
"""

import contextlib
import json
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from aegaeon.proxy.openai import Function

MAX_CALLS = 16  # in an answer that is held to a grammar
MAX_READ = 128
# Blanks as in what models have seen.
AS_DUMPED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Of a function that says nothing of its parameters.
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
# One that begins or ends a string of JSON.
_BEGUN = re.compile(
    r'\s*\{\s*"name"\s*:\s*"([^"\\]+)"(?:\s*,\s*"(?:arguments|parameters)"\s*:\s*(\{.*)|.*)',
    re.DOTALL,
)
_QUOTE = re.compile(r'(?<!\\)(?:\\\\)*"')


class Call(msgspec.Struct, frozen=True):
    """A call of an answer, the `index`-th. `arguments` is JSON as text."""

    index: int
    id: str
    name: str
    arguments: str


class _Written(msgspec.Struct, frozen=True):
    """A call as models write it, under either name of what it is given."""

    name: str
    arguments: msgspec.Raw | UnsetType = UNSET
    parameters: msgspec.Raw = msgspec.Raw(b"{}")


class CallReader(ABC):
    """Takes the text of an answer in and tells words from calls. What looks like a call and is none
    of a known function stays text. Text at the border of calls is none if it is all blank."""

    def __init__(self, names: frozenset[str], most: int, is_forced: bool) -> None:
        """Read at most `most` calls; with `is_forced` there is nothing else in the text."""
        self._names = names
        self._most = most
        self._is_forced = is_forced
        self.is_cut = False  # the last call is a beginning
        self._calls: list[Call] = []
        self._blank = ""

    @property
    def has_calls(self) -> bool:
        """Whether a call has been read."""
        return bool(self._calls)

    @property
    def is_full(self) -> bool:
        """Whether no more calls may come."""
        return len(self._calls) >= self._most

    @abstractmethod
    def push(self, text: str) -> tuple[str, list[Call]]:
        """Take more text; return words and calls that are certain now."""

    @abstractmethod
    def finish(self, is_cut: bool = False) -> tuple[str, list[Call]]:
        """Return what was held back: with `is_cut`, of a text that was to go on, the last call as
        far as it came, once it has a name."""

    def _begun(self, raw: str) -> Call | None:
        """Return the call that the JSON `raw` is the beginning of; None: nobody can tell."""
        found = _BEGUN.match(raw)
        name, arguments = (found[1], found[2] or "") if found is not None else ("", "")
        if not name and self._is_forced and len(self._names) == 1 and not self._calls:
            (name,) = self._names  # it can be no other
        if name not in self._names or self.is_full:
            return None
        with contextlib.suppress(ValueError, RecursionError):  # of arguments that are not whole
            arguments = arguments[: json.JSONDecoder().raw_decode(arguments)[1]]
        self.is_cut = True
        return self._made(name, arguments)

    def _made(self, name: str, arguments: str) -> Call:
        call = Call(len(self._calls), f"call_{secrets.token_hex(12)}", name, arguments)
        self._calls.append(call)
        return call

    def _words(self, text: str) -> str:
        """Return `text` as it may go out, blanks at its end held back."""
        text = self._blank + text
        kept = text.rstrip()
        self._blank = text[len(kept) :]
        return kept

    def _rest(self) -> str:
        blank, self._blank = self._blank, ""
        return "" if self._calls else blank

    def _call(self, raw: str) -> Call | None:
        """Return the call that the JSON `raw` is; None: it is none, or one too many."""
        try:
            found = msgspec.json.decode(raw, type=_Written)
        except (msgspec.MsgspecError, RecursionError):
            return None
        arguments = bytes(found.parameters if found.arguments is UNSET else found.arguments)
        if found.name not in self._names or self.is_full or not arguments.startswith(b"{"):
            return None
        # As the model wrote them: whoever reads them may see more in a number than we do.
        return self._made(found.name, arguments.decode())


class Dialect(ABC):
    """How a family writes calls."""

    @abstractmethod
    def reader(
        self, functions: Sequence[Function], is_many: bool, is_forced: bool = False
    ) -> CallReader:
        """Return a fresh reader of calls of `functions`, of one or of many; with `is_forced` a text
        is nothing but those."""

    @abstractmethod
    def grammar(self, functions: Sequence[Function], is_many: bool, is_free: bool) -> str:
        """Return, in llguidance's Lark, what an answer may be: calls; with `is_free` any text, in
        which calls are as their functions want them."""


class TaggedCalls(Dialect):
    """Qwen 2.5 and 3, Hermes: `<tool_call>`, an object with name and arguments, `</tool_call>`, for
    each call, behind any text."""

    def reader(
        self, functions: Sequence[Function], is_many: bool, is_forced: bool = False
    ) -> CallReader:
        return _TaggedReader(_names_of(functions), MAX_READ if is_many else 1, is_forced)

    def grammar(self, functions: Sequence[Function], is_many: bool, is_free: bool) -> str:
        more = f'("\\n<tool_call>\\n" call "\\n</tool_call>"){{0,{MAX_CALLS - 1}}}'
        start = '"<tool_call>\\n" call "\\n</tool_call>" ' + (more if is_many else "")
        if is_free:
            again = f"{{1,{MAX_CALLS}}}" if is_many else "{1,1}"
            start = f'TEXT | (lead "\\n" call "\\n</tool_call>"){again}'
        rules = [f"start: {start}", *_call_rules(functions, "arguments")]
        if is_free:
            rules += [
                # Up to the first tag, which is where a call begins to who reads it.
                r"lead[lazy]: /(.|\n)*<tool_call>/",
                r"TEXT: /(.|\n)*/ & ~/(.|\n)*<tool_call>(.|\n)*/",
            ]
        return "\n".join(rules) + "\n"


class BareCalls(Dialect):
    """Llama 3.1 to 3.3: the whole answer is one object with name and parameters."""

    def reader(
        self,
        functions: Sequence[Function],
        is_many: bool,  # noqa: ARG002
        is_forced: bool = False,
    ) -> CallReader:
        return _BareReader(_names_of(functions), 1, is_forced)

    def grammar(
        self,
        functions: Sequence[Function],
        is_many: bool,  # noqa: ARG002
        is_free: bool,
    ) -> str:
        start = "TEXT | call" if is_free else "call"
        rules = [f"start: {start}", *_call_rules(functions, "parameters")]
        if is_free:
            rules.append(r"TEXT: /([^{ \n](.|\n)*)?/")
        return "\n".join(rules) + "\n"


def dialect_of(template: str) -> Dialect | None:
    """Return how a model with this chat template writes calls; None: in no way that is known."""
    if "<function=" in template:
        return None  # calls as XML
    if "<tool_call>" in template:
        return TaggedCalls()
    if '"parameters": ' in template:
        return BareCalls()
    return None


def _names_of(functions: Sequence[Function]) -> frozenset[str]:
    return frozenset(function.name for function in functions)


def _call_rules(functions: Sequence[Function], key: str) -> list[str]:
    rules = ["call: " + " | ".join(f"call_{at}" for at in range(len(functions)))]
    for at, function in enumerate(functions):
        head = msgspec.json.encode(f'{{"name": "{function.name}", "{key}": ').decode()
        # What there is no rule for makes a function no worse, unless it wants to be taken strictly.
        guidance = {**AS_DUMPED, "lenient": not function.strict}
        schema = {**(function.parameters or NO_PARAMETERS), "x-guidance": guidance}
        rules += [
            f'call_{at}: {head} parameters_{at} "}}"',
            f"parameters_{at}: %json {msgspec.json.encode(schema).decode()}",
        ]
    return rules


class _TaggedReader(CallReader):
    _OPEN, _CLOSE = "<tool_call>", "</tool_call>"

    def __init__(self, names: frozenset[str], most: int, is_forced: bool) -> None:
        super().__init__(names, most, is_forced)
        self._held = ""
        self._is_inside = False
        self._in_strings = 0  # how much of `_held` ends in a tag that is in a string

    def push(self, text: str) -> tuple[str, list[Call]]:
        self._held += text
        words, calls = "", []
        while True:
            tag = self._CLOSE if self._is_inside else self._OPEN
            at = self._find_close() if self._is_inside else self._held.find(tag)
            if at < 0:
                break
            before, self._held = self._held[:at], self._held[at + len(tag) :]
            self._in_strings = 0
            if not self._is_inside:
                words += self._words(before)
            elif (call := self._call(before)) is not None:
                calls.append(call)
                self._blank = ""
                if self.is_full:
                    self._held = ""
                    return words, calls
            else:
                words += self._words(self._OPEN + before + self._CLOSE)
            self._is_inside = not self._is_inside
        if not self._is_inside:
            cut = len(self._held) - _open_prefix(self._held, self._OPEN)
            words += self._words(self._held[:cut])
            self._held = self._held[cut:]
        return words, calls

    def finish(self, is_cut: bool = False) -> tuple[str, list[Call]]:
        held, self._held = self._held, ""
        if is_cut and (self._is_inside or self._is_forced):
            call = self._begun(held if self._is_inside else "")
            if call is not None or self._is_forced:
                return "", [] if call is None else [call]
        words = self._words((self._OPEN if self._is_inside else "") + held)
        return words + self._rest(), []

    def _find_close(self) -> int:
        """Return where a call closes: not in one of its strings, which may have any text."""
        while (at := self._held.find(self._CLOSE, self._in_strings)) >= 0:
            # Up to the tag before, if there was one, a string is open.
            quotes = len(_QUOTE.findall(self._held, self._in_strings, at))
            if (quotes + (self._in_strings > 0)) % 2 == 0 or self._held.lstrip()[:1] != "{":
                break
            self._in_strings = at + len(self._CLOSE)
        return at


class _BareReader(CallReader):
    def __init__(self, names: frozenset[str], most: int, is_forced: bool) -> None:
        super().__init__(names, most, is_forced)
        self._held = ""
        self._is_text = False

    def push(self, text: str) -> tuple[str, list[Call]]:
        if self._is_text:
            return text, []
        self._held += text
        begun = self._held.lstrip()
        if not begun or begun[0] == "{":
            return "", []
        self._is_text = True
        held, self._held = self._held, ""
        return held, []

    def finish(self, is_cut: bool = False) -> tuple[str, list[Call]]:
        held, self._held = self._held, ""
        call = self._call(held)
        if call is None and is_cut and not self._is_text:
            call = self._begun(held)
            if self._is_forced:
                held = ""
        return ("", [call]) if call is not None else (held, [])


def _open_prefix(text: str, tag: str) -> int:
    """Return how much of the end of `text` may become `tag`."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0
