"""Tool calls and JSON as clients see them: what is asked of the instance, and what comes back."""

import asyncio
import json
import threading

import pytest
from llguidance import LLMatcher
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from aegaeon.errors import Overloaded
from aegaeon.proxy.bounded import BoundedProcess, Bounds
from aegaeon.proxy.failures import ApiError
from aegaeon.proxy.grammars import MAX_LINE, GrammarChecker
from tests.proxy.test_logprobs import stream
from tests.proxy.test_routes import CHAT_PATH, ask, error_of, post
from tests.proxy.test_tools import tagged
from tests.support.chat_templates import HEADERS, MARKS
from tests.support.proxy_server import Proxy, write_text_model

PLACE = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": PLACE}},
    {"type": "function", "function": {"name": "now", "description": "The time."}},
]
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": TOOLS}
TWO = f"Let me see.\n{tagged('weather', {'city': 'Köln'})}\n{tagged('now', {})}"


@pytest.fixture
def proxy(tmp_path):
    return serving(tmp_path, MARKS, TWO)


def serving(directory, template, answer, **changes):
    """A proxy of a model with this template, whose instance says `answer`."""
    proxy = Proxy(directory, context_tokens=2048)
    write_text_model(directory / "m", template, **changes)
    proxy.answer = proxy.text.encode(answer)
    return proxy


def called(message):
    functions = [one["function"] for one in message["tool_calls"]]
    assert all(isinstance(one["arguments"], str) for one in functions)
    return [(one["name"], json.loads(one["arguments"])) for one in functions]


def test_calls_come_as_calls_with_string_arguments(proxy):
    response = post(proxy, CHAT_PATH, CHAT).json()
    choice = ChatCompletion.model_validate(response).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    message = response["choices"][0]["message"]
    assert called(message) == [("weather", {"city": "Köln"}), ("now", {})]
    assert len({one["id"] for one in message["tool_calls"]}) == 2
    asked = proxy.instance.submitted[0]
    assert "weather" in proxy.text.decode(asked.prompt_token_ids)
    assert asked.sampling.grammar == ""


def test_nothing_but_calls_is_null_content(tmp_path):
    proxy = serving(tmp_path, MARKS, tagged("now", {}))
    message = post(proxy, CHAT_PATH, CHAT).json()["choices"][0]["message"]
    assert message["content"] is None and called(message) == [("now", {})]


def test_streamed_calls_have_an_index(proxy):
    chunks = stream(proxy, CHAT_PATH, CHAT)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Let me see."
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [call["index"] for call in calls] == [0, 1]
    assert called({"tool_calls": calls}) == [("weather", {"city": "Köln"}), ("now", {})]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons[-1] == "tool_calls" and set(reasons[:-1]) == {None}


def test_only_one_call_may_be_asked_for_at_a_time(proxy):
    body = {**CHAT, "parallel_tool_calls": False}
    choice = post(proxy, CHAT_PATH, body).json()["choices"][0]
    assert [name for name, _ in called(choice["message"])] == ["weather"]
    assert choice["finish_reason"] == "tool_calls"


def test_words_alone_are_words(tmp_path):
    proxy = serving(tmp_path, MARKS, "No idea.")
    choice = post(proxy, CHAT_PATH, CHAT).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("No idea.", "stop")
    assert "tool_calls" not in choice["message"]


def test_none_shows_no_tools_to_the_model(proxy):
    body = {**CHAT, "tool_choice": "none"}
    choice = post(proxy, CHAT_PATH, body).json()["choices"][0]
    assert "<tool_call>" in choice["message"]["content"]
    assert "weather" not in proxy.text.decode(proxy.instance.submitted[0].prompt_token_ids)


def test_what_must_be_called_is_in_the_grammar(proxy):
    choices = ["required", {"type": "function", "function": {"name": "now"}}]
    strict = json.loads(json.dumps(TOOLS))
    strict[0]["function"]["strict"] = True
    bodies = [*({**CHAT, "tool_choice": choice} for choice in choices), {**CHAT, "tools": strict}]
    ask(proxy, *[("POST", CHAT_PATH, {"json": body}) for body in bodies])
    required, named, free = (one.sampling.grammar for one in proxy.instance.submitted)
    assert "weather" in required and "now" in required and "TEXT" not in required
    assert "weather" not in named and "now" in named
    assert "TEXT" in free
    # `strict` is for us, not for the model to read.
    assert "strict" not in proxy.text.decode(proxy.instance.submitted[2].prompt_token_ids)


def test_calls_of_llamas_are_the_whole_answer(tmp_path):
    answer = '{"name": "weather", "parameters": {"city": "Rom"}}'
    proxy = serving(tmp_path, HEADERS, answer)
    choice = post(proxy, CHAT_PATH, CHAT).json()["choices"][0]
    assert called(choice["message"]) == [("weather", {"city": "Rom"})]
    assert choice["message"]["content"] is None and choice["finish_reason"] == "tool_calls"


def test_calls_and_their_answers_go_back_into_the_prompt(proxy):
    call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": '{"a": 1}'}}
    messages = [
        *CHAT["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "noon"},
    ]
    assert post(proxy, CHAT_PATH, {**CHAT, "messages": messages}).status_code == 200
    prompt = proxy.text.decode(proxy.instance.submitted[0].prompt_token_ids)
    assert '<tool_call>\n{"name": "now", "arguments": {"a": 1}}\n</tool_call>' in prompt
    assert "noon" in prompt


def test_a_model_without_tools_says_so(tmp_path):
    proxy = serving(tmp_path, "{{ messages[0].content }}", "x")
    error = error_of(post(proxy, CHAT_PATH, CHAT))
    assert (error["param"], error["code"]) == ("tools", "unsupported_parameter")
    assert "response_format" in error["message"]


WORDS = {"type": "string"}
LOOP = {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}
WIDE = {"type": "object", "properties": {f"p{at}": WORDS for at in range(900)}}
EITHER = [{"type": "object", "properties": {str(at): {"type": "string"}}} for at in range(9)]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def of_schema(schema):
    asked = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    return {"model": "m", "messages": CHAT["messages"], "response_format": asked}


def test_json_is_asked_for_by_a_grammar(proxy):
    plain = {"model": "m", "messages": CHAT["messages"]}
    formats = [{"type": "json_object"}, of_schema(SCHEMA)["response_format"], {"type": "text"}]
    ask(proxy, *[("POST", CHAT_PATH, {"json": {**plain, "response_format": f}}) for f in formats])
    of_object, by_schema, of_text = (one.sampling.grammar for one in proxy.instance.submitted)
    assert '"type":"object"' in of_object and '"integer"' in by_schema and of_text == ""
    assert all(one.stop_token_ids for one in proxy.instance.submitted)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"if": {}, "then": {}}, "Unimplemented"),
        ({"$ref": "http://example.com/a.json"}, "Resource"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "string", "pattern": "(?=a)b"}, "regex"),
        ({"type": "string", "description": "x" * 70_000}, "bytes"),
        (json.loads('{"items":' * 300 + "{}" + "}" * 300), "levels"),
        ({"allOf": [{"anyOf": EITHER}] * 9}, "too large"),
        ({"$ref": "#"}, "a $ref that leads back to itself"),
        ({"$ref": "#/$defs/a", "$defs": LOOP}, "a $ref that leads back to itself"),
        ({"properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"], "$defs": LOOP}, "$ref"),
        (WIDE, "fewer optional properties"),
        ({"type": "object", "properties": {"in": WIDE}, "required": ["in"]}, "fewer optional"),
        (False, "the schema is false"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused_before_anything_else(proxy, schema, reason):
    response = post(proxy, CHAT_PATH, of_schema(schema))
    error = error_of(response)
    assert response.status_code == 400
    assert (error["param"], error["code"]) == ("response_format", "invalid_value")
    assert reason in error["message"]
    assert proxy.instance.submitted == []


LIST = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}}


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {},
        LIST,
        {**LIST, "required": ["next"], "additionalProperties": False},
        {**WIDE, "required": [f"p{at}" for at in range(900)]},
        {"type": "array", "items": WORDS, "minItems": 5000},
        {"enum": list(range(5000))},
        {"type": "string", "pattern": "^[\\p{L}]{1,5}$"},
        {"type": "number", "minimum": 0.1, "exclusiveMaximum": 0.3},
    ],
)
def test_a_schema_that_can_be_followed_is(proxy, schema):
    assert post(proxy, CHAT_PATH, of_schema(schema)).status_code == 200
    assert proxy.instance.submitted[0].sampling.grammar


def test_a_strict_function_that_cannot_be_followed_is_refused(proxy):
    function = {"name": "f", "parameters": {"type": "object", "if": {}}, "strict": True}
    body = {**CHAT, "tools": [{"type": "function", "function": function}]}
    error = error_of(post(proxy, CHAT_PATH, body))
    assert (error["param"], error["code"]) == ("tools", "invalid_value")


@pytest.mark.parametrize("schema", [SCHEMA, {"type": "integer", "if": {}}])
def test_a_schema_is_checked_once_good_or_bad(tmp_path, monkeypatch, schema):
    asked = []
    original = BoundedProcess.ask
    monkeypatch.setattr(
        BoundedProcess, "ask", lambda self, it: asked.append(it) or original(self, it)
    )
    proxy = serving(tmp_path, MARKS, "{}")
    answers = ask(proxy, *[("POST", CHAT_PATH, {"json": of_schema(schema)})] * 3)
    assert len({one.status_code for one in answers}) == 1
    assert sum(it.startswith(b'{"grammars"') for it in asked) == 1


PATTERNS = [{"pattern": f".*a.*b.*c.*{letter}"} for letter in "defghijklmnopqrstuvw"]
HEAVY = {
    "of long computing": {"type": "integer", "multipleOf": 1_000_003},
    "of much memory": {"type": "string", "allOf": PATTERNS},
}


@pytest.fixture
def checker():
    checker = GrammarChecker(Bounds(cpu_s=0.5, memory_bytes=256 << 20, count=2))
    yield checker
    checker.close()


def grammar_of(schema):
    return LLMatcher.grammar_from_json_schema(schema)


@pytest.mark.parametrize("name", HEAVY)
def test_a_schema_of_much_work_is_refused_and_remembered(checker, name, monkeypatch):
    asked = []
    original = BoundedProcess.ask
    monkeypatch.setattr(
        BoundedProcess, "ask", lambda self, it: asked.append(it) or original(self, it)
    )

    async def test():
        for _ in range(2):
            with pytest.raises(ApiError, match="too much") as caught:
                await checker.check(grammar_of(HEAVY[name]), "tools")
            assert (caught.value.status, caught.value.param) == (400, "tools")
        assert len(asked) == 1  # the second time nothing was computed
        await checker.check(grammar_of(SCHEMA), "tools")

    asyncio.run(test())


def test_others_are_checked_beside_a_schema_of_much_work():
    async def test():
        checker = GrammarChecker(Bounds(cpu_s=2.0, memory_bytes=1 << 30, count=2))
        heavy = grammar_of(HEAVY["of long computing"])
        slow = asyncio.ensure_future(checker.check(heavy, "tools", "one"))
        await asyncio.sleep(0.1)
        await checker.check(grammar_of(SCHEMA), "tools", "another")
        assert not slow.done()
        slow.cancel()
        checker.close()

    asyncio.run(test())


class Held(GrammarChecker):
    """Its checks take until they are let go."""

    def __init__(self):
        super().__init__(Bounds(cpu_s=1.0, memory_bytes=1 << 30, count=2))
        self.at_work, self.most, self.asked = 0, 0, []
        self.go = threading.Event()

    def _asked(self, grammar):
        self.asked.append(grammar)
        self.at_work += 1
        self.most = max(self.most, self.at_work)
        if grammar.startswith("heavy"):
            assert self.go.wait(20)
        self.at_work -= 1
        return ""


def held(test):
    async def whole():
        checker = Held()
        try:
            return await asyncio.wait_for(test(checker), 30)
        finally:
            checker.go.set()
            checker.close()

    return asyncio.run(whole())


def test_schemas_of_one_who_asks_without_pause_leave_a_process_to_others():
    async def test(checker):
        heavy = [checker.check(f"heavy {n}", "tools", "greedy") for n in range(MAX_LINE + 1)]
        tasks = [asyncio.ensure_future(one) for one in heavy]
        await asyncio.sleep(0.1)
        with pytest.raises(ApiError) as caught:
            await checker.check("heavy and too much", "tools", "greedy")
        assert (caught.value.status, caught.value.code) == (429, "queue_full")
        assert int(caught.value.headers()["retry-after"]) >= 1
        await checker.check("light", "tools", "another")
        assert checker.asked == ["heavy 0", "light"] and checker.most == 2
        checker.go.set()
        await asyncio.gather(*tasks)
        assert len(checker.asked) == MAX_LINE + 2 and not checker._lines
        await checker.check("heavy and too much", "tools", "greedy")

    held(test)


def test_a_check_keeps_its_place_though_who_asked_has_gone():
    async def test(checker):
        gone = asyncio.ensure_future(checker.check("heavy 1", "tools", "a"))
        await asyncio.sleep(0.1)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        waits = asyncio.ensure_future(checker.check("heavy 2", "tools", "a"))
        await asyncio.sleep(0.1)
        assert checker.asked == ["heavy 1"]
        checker.go.set()
        await waits
        await checker.check("heavy 1", "tools", "a")
        assert checker.asked == ["heavy 1", "heavy 2"]

    held(test)


def test_many_who_ask_for_the_same_schema_share_its_check():
    async def test(checker):
        many = [checker.check("heavy", "tools", "a") for _ in range(3 * MAX_LINE)]
        tasks = [asyncio.ensure_future(one) for one in many]
        await asyncio.sleep(0.1)
        checker.go.set()
        await asyncio.gather(*tasks)
        assert checker.asked == ["heavy"]

    held(test)


def test_a_checker_that_is_killed_is_replaced_and_blames_nobody(checker, monkeypatch):
    def killed(self, asked):
        self.process.kill()
        return original(self, asked)

    async def test():
        with monkeypatch.context() as patch, pytest.raises(Overloaded):
            patch.setattr(BoundedProcess, "ask", killed)
            await checker.check(grammar_of(SCHEMA), "tools")
        await checker.check(grammar_of(SCHEMA), "tools")

    original = BoundedProcess.ask
    asyncio.run(test())


def test_who_asks_while_many_schemas_are_checked_is_told_to_come_again(checker, monkeypatch):
    monkeypatch.setattr("aegaeon.proxy.grammars.CHECK_S", 0.0)

    async def test():
        with pytest.raises(Overloaded):
            await checker.check("start: /a/", "tools")

    asyncio.run(test())
