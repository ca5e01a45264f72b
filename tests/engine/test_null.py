"""The engine without a model: same seam, deterministic tokens."""

import pytest

from aegaeon.config import Settings
from aegaeon.engine.base import NullEngine
from aegaeon.engine.open import open_engine
from aegaeon.engine.regions import Regions
from aegaeon.errors import ContextLengthExceeded, InvalidRequest
from aegaeon.types import (
    Decode,
    Load,
    LoadFailed,
    ModelSpec,
    Prefill,
    Stepped,
    Switch,
    WeightsLost,
)
from tests.support.decoder import make_request

SPEC = ModelSpec(
    id="a", path="a", architecture="none", weight_bytes=10, kv_token_bytes=3,
    context_tokens=20, vocab_tokens=50,
)  # fmt: skip


def run(request, pause=lambda seconds: None):
    engine = NullEngine((SPEC,), pause=pause, step_s=0.5, load_s=2.0)
    engine.load(Load("a"))
    engine.execute(Switch("a"))
    engine.submit(request)
    tokens = list(engine.execute(Prefill("a", (request.id,))).tokens)
    while tokens[-1].finish_reason is None:
        tokens += engine.execute(Decode("a", (request.id,))).tokens
    assert engine.usage().kv_bytes == 0
    assert tokens[-1].finish_reason == "length"
    return [token.token_id for token in tokens]


def test_tokens_end_by_length_and_resume_the_same():
    tokens = run(make_request("r", [1, 2], max_tokens=6))
    assert len(tokens) == 6
    assert len(set(tokens)) > 1
    resumed = make_request("r", [1, 2], max_tokens=6, generated_token_ids=tuple(tokens[:4]))
    assert run(resumed) == tokens[4:]
    assert run(make_request("r", [1, 3], max_tokens=6)) != tokens


def test_stop_tokens_are_never_made():
    tokens = run(make_request("r", [1, 2], max_tokens=6))
    assert not set(tokens) & set(run(make_request("r", [1, 2], stop_token_ids=tuple(tokens))))


def test_the_context_ends_a_request():
    assert len(run(make_request("r", [1] * 17, max_tokens=100))) == 3


def test_steps_and_loads_wait_on_what_they_are_given():
    waited = []
    run(make_request("r", [1], max_tokens=3), waited.append)
    assert waited == [2.0, 0.5, 0.5, 0.5]


def test_bad_requests_are_refused():
    engine = NullEngine((SPEC,), pause=lambda seconds: None)
    with pytest.raises(InvalidRequest):
        engine.submit(make_request("r", []))
    with pytest.raises(ContextLengthExceeded):
        engine.submit(make_request("r", [1] * 20))


def test_a_request_is_handed_over_with_its_next_token():
    tokens = run(make_request("r", [1, 2], max_tokens=6))
    first, second = (NullEngine((SPEC,), pause=lambda seconds: None) for _ in range(2))
    for engine in (first, second):
        engine.load(Load("a"))
    first.submit(make_request("r", [1, 2], max_tokens=6))
    first.execute(Prefill("a", ("r",)))
    kv = first.hand_over("r")
    assert (kv.cached_tokens, kv.kv_bytes) == (2, 9)
    told = make_request("r", [1, 2], max_tokens=6, generated_token_ids=(tokens[0],))
    second.adopt(told, kv)
    first.release("r")
    assert second.execute(Decode("a", ("r",))).tokens[0].token_id == tokens[1]


@pytest.mark.parametrize("trouble", [WeightsLost("a"), LoadFailed("a", "checkpoint_error", "bad")])
def test_weights_go_when_a_test_says_so_and_come_back_with_a_load(trouble):
    engine = NullEngine((SPEC,), pause=lambda seconds: None)
    engine.load(Load("a"))
    engine.submit(make_request("r", [1]))
    engine.spoil(trouble)
    assert engine.usage().weight_bytes == 0
    assert engine.execute(Prefill("a", ("r",))) == trouble
    engine.load(Load("a"))
    assert isinstance(engine.execute(Prefill("a", ("r",))), Stepped)


def test_the_settings_choose_the_engine():
    assert isinstance(open_engine(Settings(device="null"), (SPEC,), Regions("", "")), NullEngine)
