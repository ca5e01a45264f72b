"""The engine without a model: same seam, deterministic tokens."""

import pytest

from aegaeon.config import Settings
from aegaeon.engine.base import NullEngine
from aegaeon.engine.open import open_engine
from aegaeon.engine.regions import Regions
from aegaeon.errors import ContextLengthExceeded, InvalidRequest
from aegaeon.types import Decode, Load, ModelSpec, Prefill, Switch
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


def test_the_settings_choose_the_engine():
    assert isinstance(open_engine(Settings(device="null"), (SPEC,), Regions("", "")), NullEngine)
