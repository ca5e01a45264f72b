"""What may be called and what must be, and calls that end before they are whole."""

import json

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from aegaeon.proxy.tools import TaggedCalls
from tests.proxy.test_calls import CHAT, serving
from tests.proxy.test_logprobs import stream
from tests.proxy.test_routes import CHAT_PATH, ask, error_of, post
from tests.proxy.test_tools import BARE, FUNCTIONS, TAGGED, follows, plain_vocabulary, tagged
from tests.support.chat_templates import HEADERS, MARKS

__all__ = ["plain_vocabulary"]
NAMED = {"type": "function", "function": {"name": "weather"}}
BEGUN = '{"name": "weather", "arguments": {"city": "K'


def allowed(mode, *names):
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.fixture
def proxy(tmp_path):
    return serving(tmp_path, MARKS, f"Let me see.\n{tagged('weather', {'city': 'Köln'})}")


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_of_many_tools_only_the_allowed_are_in_the_grammar(proxy, mode):
    assert post(proxy, CHAT_PATH, {**CHAT, "tool_choice": allowed(mode, "now")}).is_success
    asked = proxy.instance.submitted[0]
    assert "now" in asked.sampling.grammar and "weather" not in asked.sampling.grammar
    assert ("TEXT" in asked.sampling.grammar) == (mode == "auto")
    # The prompt names all of them: it is the same as where others are allowed, and so is its KV.
    assert "weather" in proxy.text.decode(asked.prompt_token_ids)


def test_where_all_are_allowed_it_is_as_without(proxy):
    bodies = [{**CHAT, "tool_choice": allowed("auto", "now", "weather")}]
    bodies += [{**CHAT, "tool_choice": allowed("required", "now", "weather")}, CHAT]
    bodies.append({**CHAT, "tool_choice": "required"})
    ask(proxy, *[("POST", CHAT_PATH, {"json": body}) for body in bodies])
    some, must, free, required = (one.sampling.grammar for one in proxy.instance.submitted)
    assert some == free == "" and must == required != ""


def test_a_grammar_of_some_tools_takes_words_and_no_other_call(plain_vocabulary):
    lark = TAGGED.grammar([FUNCTIONS[1]], is_many=True, is_free=True)
    assert follows(plain_vocabulary, lark, "No idea.") == (True, True)
    assert follows(plain_vocabulary, lark, f"So.\n{tagged('now', {})}") == (True, True)
    assert follows(plain_vocabulary, lark, tagged("weather", {"city": "x"})) == (False, False)


@pytest.mark.parametrize(
    ("choice", "named"),
    [
        (allowed("auto", "nobody"), "tool_choice"),
        (allowed("auto"), "tool_choice.allowed_tools.tools"),
        (allowed("sometimes", "now"), "tool_choice.allowed_tools.mode"),
        ({"type": "allowed_tools"}, "tool_choice.allowed_tools"),
        ({"type": "function"}, "tool_choice.function"),
        ({"type": "custom", "custom": {"name": "now"}}, "tool_choice.type"),
    ],
)
def test_choices_that_cannot_be_are_refused_by_name(proxy, choice, named):
    response = post(proxy, CHAT_PATH, {**CHAT, "tool_choice": choice})
    assert (response.status_code, error_of(response)["param"]) == (400, named)


def cut_at(text, dialect=TAGGED, is_forced=True, functions=FUNCTIONS):
    """Words and calls of a text that the limit of tokens ends."""
    reader = dialect.reader(functions, True, is_forced)
    words, calls = reader.push(text)
    rest, more = reader.finish(is_cut=True)
    return words + rest, [(call.name, call.arguments) for call in calls + more]


CUT = {
    "<tool_c": [],
    '<tool_call>\n{"na': [],
    '<tool_call>\n{"name": "weath': [],
    '<tool_call>\n{"name": "weather"': [("weather", "")],
    '<tool_call>\n{"name": "weather", "argum': [("weather", "")],
    f"<tool_call>\n{BEGUN}": [("weather", '{"city": "K')],
    f'<tool_call>\n{BEGUN}"}}': [("weather", '{"city": "K"}')],
    f'<tool_call>\n{BEGUN}"}}}}\n</tool_': [("weather", '{"city": "K"}')],
    f"{tagged('now', {})}\n<tool_": [("now", "{}")],
    f"{tagged('now', {})}\n<tool_call>\n{BEGUN}": [("now", "{}"), ("weather", '{"city": "K')],
}


@pytest.mark.parametrize("text", CUT)
def test_a_call_that_must_come_is_told_as_far_as_it_came(text):
    assert cut_at(text) == ("", CUT[text])
    bare = text.removeprefix("<tool_call>").replace("arguments", "parameters")
    if text.count("<tool_") == 1 and "</tool" not in text and text != "<tool_c":
        assert cut_at(bare, BARE) == ("", CUT[text])


@pytest.mark.parametrize("text", ["", "<tool_c", "<tool_call>", '<tool_call>\n{"name": "no'])
def test_a_call_that_can_be_no_other_has_its_name_from_the_start(text):
    assert cut_at(text, functions=[FUNCTIONS[1]]) == ("", [("now", "")])
    # The second call may never have come.
    whole = tagged("now", {})
    assert cut_at(f"{whole}\n<tool_c", functions=[FUNCTIONS[1]]) == ("", [("now", "{}")])


def test_where_words_may_come_what_names_no_function_stays_words():
    words = "a <tool_c"
    assert cut_at(words, is_forced=False) == (words, [])
    words = '<tool_call>\n{"name": "nobody", "arguments": {"a'
    assert cut_at(words, is_forced=False) == (words, [])
    begun = f"So.\n<tool_call>\n{BEGUN}"
    assert cut_at(begun, is_forced=False) == ("So.", [("weather", '{"city": "K')])


def test_arguments_that_nest_deeply_are_told_as_they_are():
    begun = '<tool_call>{"name": "now", "arguments": {"a": ' + "[" * 100_000
    (call,) = cut_at(begun)[1]
    assert call[1].startswith('{"a": [[') and len(call[1]) > 100_000


def cut(directory, template, choice, is_whole):
    """What comes of an answer that max_tokens cuts within its arguments."""
    key = "arguments" if template == MARKS else "parameters"
    call = BEGUN.replace("arguments", key)
    begun = f"<tool_call>\n{call}" if template == MARKS else call
    proxy = serving(directory, template, f'{begun}öln"}}}}')
    body = {**CHAT, "tool_choice": choice, "max_tokens": len(proxy.text.encode(begun, False))}
    if is_whole:
        answer = post(proxy, CHAT_PATH, body).json()
        choice = ChatCompletion.model_validate(answer).choices[0]
        assert "<tool_call>" not in (choice.message.content or "")
        return choice.message.tool_calls, choice.finish_reason
    chunks = [ChatCompletionChunk.model_validate(one) for one in stream(proxy, CHAT_PATH, body)]
    choices = [chunk.choices[0] for chunk in chunks]
    assert not any(choice.delta.content for choice in choices)
    calls = [call for choice in choices for call in choice.delta.tool_calls or ()]
    assert [call.index for call in calls] == [0]
    return calls, choices[-1].finish_reason


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("choice", ["required", NAMED, allowed("required", "weather")])
@pytest.mark.parametrize("template", [MARKS, HEADERS])
def test_a_cut_call_comes_as_a_call_that_ends_by_length(tmp_path, template, choice, is_whole):
    (call,), reason = cut(tmp_path, template, choice, is_whole)
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "K')
    assert reason == "length"


def test_before_a_name_is_known_nothing_is_said(tmp_path):
    proxy = serving(tmp_path, MARKS, tagged("weather", {}))
    choice = post(proxy, CHAT_PATH, {**CHAT, "tool_choice": "required", "max_tokens": 3}).json()
    choice = choice["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "length")
    assert "tool_calls" not in choice["message"]


def test_a_call_that_ends_just_in_time_is_whole():
    assert isinstance(TAGGED, TaggedCalls)
    reader = TAGGED.reader(FUNCTIONS, False, True)
    _, (call,) = reader.push(tagged("now", {}))
    assert reader.is_full and not reader.is_cut and json.loads(call.arguments) == {}
