"""Calls of a model with Qwen3's tokenizer, which has a token for each tag, as its engine draws
them."""

import json
import shutil

import pytest
from llguidance import LLMatcher

from aegaeon.models.references import resolve
from aegaeon.proxy.openai import Function
from aegaeon.proxy.tools import TaggedCalls
from aegaeon.sampling import SamplingParams
from benchmark.random_model import write_model
from tests.engine.test_checkpoints import SETTINGS, opened
from tests.proxy.test_chat import QWEN3_DIR
from tests.support.decoder import load_in_thread, make_request
from tests.support.runner import Runner

SIZES = {
    "vocab_size": 151_936,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "sign": {"enum": ["<|im_end|>", "</tool_call>", "<think>"]},
    },
    "required": ["city", "sign"],
    "additionalProperties": False,
}
FUNCTIONS = [
    Function("weather", "Tells the weather.", WEATHER, strict=True),
    Function("now", strict=True),
]
OPEN, CLOSE = 151_657, 151_658
# A random model's text would hardly ever come to a call.
LIKES_CALLS = ((OPEN, 30.0), (CLOSE, 5.0))
SEEDS = range(4)


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    if not (QWEN3_DIR / "tokenizer.json").is_file():
        pytest.skip("needs Qwen3's tokenizer; run `make qwen3-tokenizer` once")
    root = tmp_path_factory.mktemp("models")
    write_model(root / "m", SIZES)
    for file in QWEN3_DIR.iterdir():
        shutil.copy(file, root / "m")
    return resolve(str(root / "m"), str(root))


def answers(spec, text, lark, **params):
    """The texts that are drawn of each seed, together in one batch."""
    grammar = LLMatcher.grammar_from_lark(lark)
    requests = [
        make_request(
            f"r{seed}",
            [5, 6, 7, 8],
            model=spec.id,
            sampling=SamplingParams(grammar=grammar, temperature=1.0, seed=seed, **params),
            max_tokens=400,
            stop_token_ids=text.stop_token_ids,
        )
        for seed in SEEDS
    ]
    with opened(SETTINGS, (spec,)) as engine:
        load_in_thread(engine, spec.id)
        runner = Runner(engine)
        runner.submit(*requests)
        runner.finish()
    assert not runner.failures
    assert set(runner.reasons.values()) == {"stop"}
    assert all(runner.tokens[one.id][0] == OPEN for one in requests)
    return [text.decode(tuple(runner.tokens[one.id])) for one in requests]


def calls_of(answer, functions, is_many):
    reader = TaggedCalls().reader(functions, is_many)
    words, calls = reader.push(answer)
    assert not words.strip() and calls
    for call in calls:
        arguments = json.loads(call.arguments)
        if call.name == "now":
            assert arguments == {}
            continue
        assert call.name == "weather" and set(arguments) == {"city", "sign"}
        assert len(arguments["city"]) <= 12
        assert arguments["sign"] in WEATHER["properties"]["sign"]["enum"]
    return calls


@pytest.mark.parametrize(
    ("functions", "is_many", "is_free"),
    [(FUNCTIONS, True, False), (FUNCTIONS[:1], False, False), (FUNCTIONS, False, True)],
    ids=["required", "named", "auto"],
)
def test_arguments_follow_their_schema(spec, text, functions, is_many, is_free):
    lark = TaggedCalls().grammar(functions, is_many, is_free)
    params = {"logit_bias": LIKES_CALLS} if is_free else {}
    told = answers(spec, text, lark, **params)
    names = {call.name for answer in told for call in calls_of(answer, functions, is_many)}
    assert names <= {one.name for one in functions}
    assert len(set(told)) > 1, "seeds are to differ"
