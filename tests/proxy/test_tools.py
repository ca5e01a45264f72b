"""Calls read from text, however it is cut, and the grammars that calls are held to."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher

from aegaeon.models.grammar import check_grammar
from aegaeon.models.vocabulary import read_vocabulary
from aegaeon.proxy.openai import Function
from aegaeon.proxy.tools import BareCalls, TaggedCalls, dialect_of
from tests.proxy.test_chat import QWEN3_DIR
from tests.support.chat_templates import HEADERS, MARKS
from tests.support.checkpoints import IM_END, VOCAB_TOKENS
from tests.support.proxy_server import write_text_model

PLACE = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"enum": ["c", "f"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = Function("weather", "Tells the weather.", PLACE, strict=True)
FUNCTIONS = [WEATHER, Function("now")]
QWEN3_TOKENS, QWEN3_END = 151_936, 151_645
TAGGED, BARE = TaggedCalls(), BareCalls()


def read(dialect, text, cuts=(), is_many=True):
    """The words and the calls of `text`, pushed in pieces."""
    reader = dialect.reader(FUNCTIONS, is_many)
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    words, calls = "", []
    for first, last in pairwise(edges):
        more, found = reader.push(text[first:last])
        words, calls = words + more, calls + found
        if reader.is_full:
            break
    else:
        more, found = reader.finish()
        words, calls = words + more, calls + found
    assert [call.index for call in calls] == list(range(len(calls)))
    assert len({call.id for call in calls}) == len(calls)
    return words, [(call.name, json.loads(call.arguments)) for call in calls]


def tagged(name, arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


ONE = tagged("weather", {"city": "Zürich {<tool_call}"})
TEXTS = {
    "words alone \n": ("words alone \n", []),
    "a < b <tool_cal": ("a < b <tool_cal", []),
    ONE: ("", [("weather", {"city": "Zürich {<tool_call}"})]),
    f"Let me look.\n{ONE}\n{tagged('now', {})}\n": (
        "Let me look.",
        [("weather", {"city": "Zürich {<tool_call}"}), ("now", {})],
    ),
    tagged("now", {"a\\\\": '"</tool_call></tool_call>'}): (
        "",
        [("now", {"a\\\\": '"</tool_call></tool_call>'})],
    ),
    f"{tagged('now', {})} then words": (" then words", [("now", {})]),
    tagged("nobody", {}): (tagged("nobody", {}), []),
    "<tool_call>not json</tool_call>": ("<tool_call>not json</tool_call>", []),
    '<tool_call>\n{"name": "now", "argu': ('<tool_call>\n{"name": "now", "argu', []),
    '<tool_call>{"name": "now", "arguments": [1]}</tool_call>': (
        '<tool_call>{"name": "now", "arguments": [1]}</tool_call>',
        [],
    ),
}


@pytest.mark.parametrize("text", TEXTS)
@given(cuts=st.lists(st.integers(0, 200), max_size=6))
def test_calls_in_tags_are_read_however_the_text_is_cut(text, cuts):
    assert read(TAGGED, text, cuts) == TEXTS[text]


def test_of_one_call_allowed_only_the_first_is_read():
    text = f"{tagged('now', {})}\n{ONE}"
    assert read(TAGGED, text, is_many=False) == ("", [("now", {})])


BARES = {
    '{"name": "weather", "parameters": {"city": "Bonn"}}': ("", [("weather", {"city": "Bonn"})]),
    '\n {"name": "now", "arguments": {}}\n': ("", [("now", {})]),
    '{"name": "now"}': ("", [("now", {})]),
    '{"name": "nobody", "parameters": {}}': ('{"name": "nobody", "parameters": {}}', []),
    '{"a": ': ('{"a": ', []),
    ' words {"name": "now"} ': (' words {"name": "now"} ', []),
    "": ("", []),
    " ": (" ", []),
}


@pytest.mark.parametrize("text", BARES)
@given(cuts=st.lists(st.integers(0, 200), max_size=6))
def test_a_bare_call_is_read_however_the_text_is_cut(text, cuts):
    assert read(BARE, text, cuts) == BARES[text]


def test_arguments_are_as_the_model_wrote_them():
    arguments = '{"a": 1.50, "b": 123456789012345678901234567890, "c": "\\u00fc"}'
    reader = TAGGED.reader(FUNCTIONS, True)
    text = f'<tool_call>{{"arguments": {arguments}, "name": "now"}}</tool_call>'
    (call,) = reader.push(text)[1]
    assert call.arguments == arguments


def test_templates_tell_how_a_model_writes_calls():
    assert isinstance(dialect_of(MARKS), TaggedCalls)
    assert isinstance(dialect_of(HEADERS), BareCalls)
    assert dialect_of("{{ messages }}") is None
    assert dialect_of("<tool_call>\n<function=f>") is None


@pytest.fixture(scope="module")
def plain_vocabulary(tmp_path_factory):
    directory = write_text_model(tmp_path_factory.mktemp("vocabulary"))
    return read_vocabulary(str(directory), VOCAB_TOKENS, (IM_END,))


@pytest.fixture(scope="module")
def qwen3_vocabulary():
    if not (QWEN3_DIR / "tokenizer.json").is_file():
        pytest.skip("needs Qwen3's tokenizer; run `make qwen3-tokenizer` once")
    return read_vocabulary(str(QWEN3_DIR), QWEN3_TOKENS, (QWEN3_END,))


@pytest.fixture(params=["plain", "qwen3"])
def vocabulary(request):
    """One that has tags in pieces, one that has a token for each."""
    return request.getfixturevalue(f"{request.param}_vocabulary")


def follows(vocabulary, lark, text):
    """Whether `text` is whole, and whether it is a beginning."""
    grammar = LLMatcher.grammar_from_lark(lark)
    check_grammar(grammar)
    matcher = LLMatcher(vocabulary, grammar, log_level=0)
    tokens = vocabulary.tokenize_str(text)
    is_beginning = True
    for token in tokens:
        is_allowed = bool(matcher.compute_bitmask()[token // 8] >> token % 8 & 1)
        is_beginning = matcher.try_consume_tokens([token]) == 1
        assert is_beginning == is_allowed, "a mask says what may come, no more and no less"
        if not is_beginning:
            break
    return is_beginning and matcher.is_accepting(), is_beginning


NOW = tagged("now", {})
WHOLE = [
    ("forced", NOW, True),
    ("forced", tagged("weather", {"city": "Rom", "unit": "c"}), True),
    ("forced", f"{NOW}\n{NOW}", True),
    ("forced", "words", False),
    ("forced", tagged("nobody", {}), False),
    ("forced", tagged("weather", {"unit": "c"}), False),
    ("one", NOW, True),
    ("one", f"{NOW}\n{NOW}", False),
    ("free", "words", True),
    ("free", "words <tool_cal", True),
    ("free", f"words\n{NOW}", True),
    ("free", NOW + NOW, True),
    ("free", f"words\n{tagged('weather', {'unit': 'x'})}", False),
    ("free", f"<tool_call>{NOW}", False),
]
CASES = {"forced": (True, False), "one": (False, False), "free": (True, True)}


@pytest.mark.parametrize(("case", "text", "expected"), WHOLE)
def test_calls_in_tags_are_held_to_their_grammar(vocabulary, case, text, expected):
    lark = TAGGED.grammar(FUNCTIONS, *CASES[case])
    assert follows(vocabulary, lark, text)[0] == expected
    if expected:
        calls = read(TAGGED, text)[1]
        assert bool(calls) == ("</tool_call>" in text)


@pytest.mark.parametrize(
    ("is_free", "text", "expected"),
    [
        (False, '{"name": "weather", "parameters": {"city": "Rom"}}', True),
        (False, '{"name": "weather", "parameters": {"town": "Rom"}}', False),
        (False, "words", False),
        (True, "words", True),
        (True, "", True),
        (True, '{"name": "now", "parameters": {}}', True),
        (True, '{"name": "now", "parameters": {"a": 1}}', False),
    ],
)
def test_bare_calls_are_held_to_their_grammar(vocabulary, is_free, text, expected):
    lark = BARE.grammar(FUNCTIONS, True, is_free)
    assert follows(vocabulary, lark, text)[0] == expected


def test_a_function_that_is_not_strict_may_have_rules_that_nobody_can_follow(vocabulary):
    odd = {"type": "object", "properties": {"a": {"type": "integer"}}, "if": {"a": 1}}
    text = tagged("f", {"a": 5})
    assert follows(vocabulary, TAGGED.grammar([Function("f", None, odd)], True, False), text)[0]
    with pytest.raises(Exception, match="cannot be followed"):
        follows(vocabulary, TAGGED.grammar([Function("f", None, odd, True)], True, False), text)


def test_what_a_schema_says_cannot_leave_its_place(vocabulary):
    """The schema is the client's, and stands in the middle of a grammar."""
    nasty = {"type": "object", "description": '"} start: /.*/\n%json {"', "properties": {}}
    lark = TAGGED.grammar([Function("f", None, nasty)], True, False)
    assert follows(vocabulary, lark, tagged("f", {}))[0]
    assert follows(vocabulary, lark, "words") == (False, False)
