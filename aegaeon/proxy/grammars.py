"""What an answer is held to: JSON, a schema, calls of functions; checked before anything is sent
to an instance."""

import asyncio
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
from llguidance import LLMatcher

from aegaeon.errors import Overloaded
from aegaeon.models.grammar import digest_of
from aegaeon.proxy.bounded import BoundedProcesses, Bounds
from aegaeon.proxy.failures import ApiError, invalid
from aegaeon.proxy.openai import ChatBody, Function, ToolChoice
from aegaeon.proxy.schemas import check_loops
from aegaeon.proxy.tokenizer import TextModel
from aegaeon.proxy.tools import CallReader, Dialect
from aegaeon.proxy.waits import within

CHECK_S = 10.0
# Of one check; an ordinary one takes milliseconds and megabytes.
BOUNDS = Bounds(cpu_s=2.0, memory_bytes=512 << 20, count=2)
MAX_CHECKED = 4096  # remembered, by their digests
MAX_LINE = 16  # of one who asks, behind the one that is checked
# Small models put blanks after blanks for ever where they may.
_BLANKS = {"whitespace_flexible": True, "whitespace_pattern": r"[ \n\r\t]{1,40}"}


class Tools(msgspec.Struct, frozen=True):
    """The functions that an answer may or must call, and how the model writes that. With `is_part`
    it is shown others, too."""

    dialect: Dialect
    functions: tuple[Function, ...]
    is_many: bool
    is_forced: bool
    is_part: bool = False

    def reader(self) -> CallReader:
        """Return what reads the calls of one choice."""
        return self.dialect.reader(self.functions, self.is_many, self.is_forced)

    @property
    def is_held(self) -> bool:
        """Whether an answer is held to a grammar."""
        is_strict = any(function.strict for function in self.functions)
        return self.is_forced or self.is_part or is_strict

    def grammar(self) -> str:
        """Return the grammar of an answer; empty: any text will do."""
        if not self.is_held:
            return ""
        lark = self.dialect.grammar(self.functions, self.is_many, is_free=not self.is_forced)
        return LLMatcher.grammar_from_lark(lark)


def tools_of(body: ChatBody, text: TextModel) -> Tools | None:
    """Return what a chat may call. Raises ApiError where the model has no way to."""
    if not body.tools or body.tool_choice == "none":
        return None
    if text.dialect is None:
        message = (
            "this model's chat template has no tool calls that can be read; describe the functions "
            "in a message and ask for JSON by 'response_format', or ask another model"
        )
        raise ApiError(400, "unsupported_parameter", message, "tools")
    choice, functions = body.tool_choice, tuple(tool.function for tool in body.tools)
    is_chosen, is_one = isinstance(choice, ToolChoice), False
    is_forced = choice == "required"
    if isinstance(choice, ToolChoice):
        functions = tuple(one for one in functions if one.name in choice.names)
        is_forced, is_one = choice.is_forced, choice.type == "function"
    tools = Tools(
        text.dialect,
        functions,
        is_many=body.parallel_tool_calls is not False and not is_one,
        is_forced=is_forced,
        is_part=is_chosen and len(functions) < len(body.tools),
    )
    if tools.is_held:
        for function in functions:
            check_loops("tools", function.parameters or {})
    if body.ignore_eos and tools.is_held:
        raise invalid("ignore_eos", "calls end where they are complete; leave 'ignore_eos' out")
    return tools


def for_template(body: ChatBody) -> list[dict[str, Any]]:
    """Return a chat's tools as chat templates expect them."""
    functions = [_plain(tool.function) for tool in body.tools or ()]
    return [{"type": "function", "function": msgspec.to_builtins(one)} for one in functions]


def answer_grammar(body: ChatBody) -> str:
    """Return the grammar of what `response_format` asks for; empty: any text will do. Raises
    ApiError."""
    asked = body.response_format
    if asked is None or asked.type == "text":
        return ""
    schema: Any = {"type": "object"}
    if asked.type == "json_schema":
        assert asked.json_schema is not None
        schema = asked.json_schema.schema
        if schema is False:
            raise invalid("response_format", "the schema is false, which no answer satisfies")
        if schema is True:
            schema = {}  # which says the same
        check_loops("response_format", schema)
    # Not as an object, whose depth is the interpreter's trouble.
    raw = msgspec.json.encode(schema).decode()
    try:
        return LLMatcher.grammar_from_json_schema(raw, overrides=_BLANKS)  # type: ignore[arg-type]
    except ValueError as error:
        raise invalid("response_format", f"the schema cannot be followed: {error}") from None


class _Line:
    """The checks of one who asks: one is at work, the others wait for it in order."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.checks = 0  # with the one at work


class GrammarChecker:
    """Says no to what no instance could follow, and remembers what it said. Owns its threads and
    processes, until `close`; whatever is at work in them ends at its bounds. `check` is called on
    one event loop.

    Whoever asks has one check at work at a time: heavy schemas hold up their own. Those who ask for
    the same grammar share a check.
    """

    def __init__(self, bounds: Bounds = BOUNDS) -> None:
        self._processes = BoundedProcesses("aegaeon.proxy.grammar_worker", bounds)
        # As many as there are processes: none has to wait for one.
        self._threads = ThreadPoolExecutor(bounds.count, thread_name_prefix="aegaeon-grammars")
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, str] = OrderedDict()  # what is wrong with it, if anything
        self._lines: dict[str, _Line] = {}
        self._asked_for: dict[bytes, asyncio.Future[str]] = {}
        self._mean_s = 0.01  # of a check, lately

    async def check(self, grammar: str, param: str, asker: str = "") -> None:
        """Raise ApiError, for the field `param` or with too many of `asker` to check, or Overloaded
        with too many of all."""
        name = digest_of(grammar)
        wrong = self._told(name)
        if wrong is None:
            try:
                wrong = await within(CHECK_S, self._checked(name, grammar, asker))
            except asyncio.TimeoutError:
                raise Overloaded("many schemas are being checked; try again later") from None
        if wrong:
            raise invalid(param, wrong)

    async def _checked(self, name: bytes, grammar: str, asker: str) -> str:
        """Return what is wrong. Who asked may go away; a check goes on, and so keeps its place."""
        asked = self._asked_for.get(name)
        if asked is None:
            asked = self._asked_for[name] = self._enter(name, grammar, asker)
            asked.add_done_callback(lambda _: self._asked_for.pop(name))
        return await asyncio.shield(asked)

    def _enter(self, name: bytes, grammar: str, asker: str) -> asyncio.Future[str]:
        line = self._lines.setdefault(asker, _Line())
        if line.checks > MAX_LINE:
            text = f"{MAX_LINE} schemas of yours wait to be checked; try again later"
            wait_s = line.checks * self._mean_s
            raise ApiError(429, "queue_full", text, retry_after_s=wait_s)
        line.checks += 1
        return asyncio.ensure_future(self._in_turn(name, grammar, asker, line))

    async def _in_turn(self, name: bytes, grammar: str, asker: str, line: _Line) -> str:
        try:
            async with line.lock:
                began_s, loop = time.monotonic(), asyncio.get_running_loop()
                wrong = await loop.run_in_executor(self._threads, self._check, name, grammar)
                self._mean_s += 0.1 * (time.monotonic() - began_s - self._mean_s)
                return wrong
        finally:
            line.checks -= 1
            if not line.checks:
                del self._lines[asker]

    def _check(self, name: bytes, grammar: str) -> str:
        """Return what is wrong. On a thread, which remembers it whether or not somebody waits."""
        wrong = self._told(name)  # of one who asked just before
        if wrong is not None:
            return wrong
        wrong = self._asked(grammar)
        with self._lock:
            self._known[name] = wrong
            if len(self._known) > MAX_CHECKED:
                self._known.popitem(last=False)
        return wrong

    def _asked(self, grammar: str) -> str:
        process = self._processes.take()
        try:
            answer = process.ask(grammar.encode())
        except BaseException:
            self._processes.bury(process)
            raise
        if answer is not None:
            self._processes.give_back(process)
            return answer.decode()
        if self._processes.bury(process):
            return "the schema takes too much to follow; make it simpler"
        raise Overloaded("what checks schemas was lost; try again later")

    def _told(self, name: bytes) -> str | None:
        with self._lock:
            if name in self._known:
                self._known.move_to_end(name)
            return self._known.get(name)

    def close(self) -> None:
        """End threads and processes. Idempotent."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._processes.close()


def _plain(function: Function) -> Function:
    # Templates show a function to the model, and `strict` is not for it to see.
    return msgspec.structs.replace(function, strict=None)
