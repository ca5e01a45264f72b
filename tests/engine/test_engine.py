"""A request's tokens are the same alone and in any company; ends, failures and memory."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aegaeon.errors import ContextLengthExceeded, InvalidRequest, OutOfBlocks
from aegaeon.types import (
    Decode,
    Load,
    LoadFailed,
    Prefill,
    Request,
    SamplingParams,
    Switch,
    Switched,
    WeightsLost,
)
from tests.support.decoder import (
    CONTEXT,
    DEVICES,
    SHAPES,
    VOCAB,
    all_kv_bytes,
    load_in_thread,
    load_tiny,
    make_engine,
    make_request,
)
from tests.support.runner import Runner

SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, top_k=40, seed=7)
GREEDY = SamplingParams(temperature=0.0)


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(f"{length} {seed}").choices(range(VOCAB), k=length)


@pytest.fixture(scope="module", params=DEVICES)
def device(request):
    return request.param


def alone(request: Request):
    runner = Runner(make_engine())
    runner.submit(request)
    return runner.finish()[request.id]


def mates() -> list[Request]:
    lengths = [5, 40, 1, 130, 17, 300, 16, 33]
    return [
        make_request(
            f"r{i}",
            prompt(length, i),
            model="ab"[i % 2],
            sampling=(SAMPLED, GREEDY, SamplingParams(temperature=1.5, seed=i))[i % 3],
            max_tokens=6 + i,
        )
        for i, length in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def expected():
    return {request.id: alone(request) for request in mates()}


@settings(max_examples=6, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 1 << 32))
def test_tokens_are_the_same_among_random_mates_of_two_models(device, expected, seed):
    runner = Runner(make_engine(device=device))
    runner.submit(*mates())
    assert runner.finish(random.Random(seed)) == expected


def test_random_prompts_give_different_tokens(expected):
    assert len({tuple(tokens) for tokens in expected.values()}) == len(expected)
    assert all(len(set(tokens)) > 2 for tokens in expected.values())


@settings(max_examples=5, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 1 << 32))
def test_tokens_are_the_same_when_blocks_run_out(device, expected, seed):
    blocks = SHAPES["b"].block_bytes * 26
    runner = Runner(make_engine(device=device, kv_bytes=blocks))
    runner.submit(*mates())
    assert runner.finish(random.Random(seed)) == expected
    assert all_kv_bytes(runner.engine) == 0


def test_scarce_blocks_are_taken_from_others(device):
    """What the test above relies on: some of its orders, though not all, run out of blocks."""
    preempted = 0
    for seed in range(3):
        runner = Runner(make_engine(device=device, kv_bytes=SHAPES["b"].block_bytes * 26))
        runner.submit(*mates())
        runner.finish(random.Random(seed))
        preempted += runner.preempted
    assert preempted > 0


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_a_resumed_request_continues_with_the_same_tokens(sampling):
    request = make_request("r", prompt(37), sampling=sampling)
    tokens = alone(request)
    for done in range(1, len(tokens)):
        resumed = make_request(
            "r", prompt(37), sampling=sampling, generated_token_ids=tuple(tokens[:done])
        )
        assert alone(resumed) == tokens[done:], done


def test_a_request_that_lost_its_kv_at_any_step_continues_with_the_same_tokens(device):
    request = make_request("r", prompt(37), sampling=SAMPLED)
    tokens = alone(request)
    for lost_at in range(1, len(tokens)):
        runner = Runner(make_engine(device=device))
        runner.submit(request)
        for _ in range(lost_at):
            runner.act(Prefill("a", ("r",)))
        with runner.engine._lock:
            runner.engine._kv.give_up(runner.engine._sequences.get("r"))
        assert runner.finish()["r"] == tokens, lost_at


@pytest.mark.parametrize("rows", [1, 7, 16, 100, 512])
def test_tokens_are_the_same_wherever_prompts_are_cut(device, rows, monkeypatch, expected):
    from aegaeon.engine import engine as module  # noqa: PLC0415

    plan = module.plan_passes
    monkeypatch.setattr(module, "plan_passes", lambda those, shares: plan(those, rows, shares))
    chosen = [request for request in mates() if len(request.prompt_token_ids) < 200]
    runner = Runner(make_engine(device=device))
    runner.submit(*chosen)
    assert runner.finish() == {request.id: expected[request.id] for request in chosen}


def test_a_stop_token_ends_a_request_and_is_its_last(device):
    tokens = alone(make_request("r", prompt(9)))
    stop = tokens[4]
    runner = Runner(make_engine(device=device))
    runner.submit(make_request("r", prompt(9), stop_token_ids=(stop,)))
    got = runner.finish()["r"]
    assert got == tokens[: tokens.index(stop) + 1]
    assert runner.reasons == {"r": "stop"}


def test_max_tokens_and_the_context_end_a_request_by_length(device):
    runner = Runner(make_engine(device=device))
    runner.submit(make_request("short", prompt(9), max_tokens=3))
    runner.submit(make_request("long", prompt(CONTEXT - 2), max_tokens=50))
    tokens = runner.finish()
    assert [len(tokens["short"]), len(tokens["long"])] == [3, 2]
    assert runner.reasons == {"short": "length", "long": "length"}
    assert runner.engine.usage().kv_bytes == 0


def test_a_prompt_that_is_all_the_context_is_scored(device):
    given, params = prompt(CONTEXT), SamplingParams(temperature=0.0, prompt_logprobs=0)
    whole = Runner(make_engine(device=device))
    whole.submit(make_request("r", given, sampling=params, max_tokens=1))
    assert len(whole.finish()["r"]) == 1
    less = Runner(make_engine(device=device))
    less.submit(make_request("r", given[:-1], sampling=params, max_tokens=1))
    less.finish()
    assert len(whole.scores["r"]) == CONTEXT - 1
    assert whole.scores["r"][:-1] == less.scores["r"]
    with pytest.raises(ContextLengthExceeded):
        whole.submit(make_request("s", given, max_tokens=2))


def test_a_nan_fails_its_own_request_only(device, expected):
    poisoned = 95
    clean = next(r for r in mates() if r.model == "a" and poisoned not in r.prompt_token_ids)
    if poisoned in expected[clean.id]:
        pytest.fail("choose another token to poison")
    engine = make_engine(device=device)
    engine._weights.models["a"].poison_token = poisoned
    runner = Runner(engine)
    runner.submit(make_request("bad", [1, poisoned, 2]), clean)
    runner.act(Prefill("a", ("bad", clean.id)))
    assert runner.failures == {"bad": "internal_error"}
    assert runner.finish()[clean.id] == expected[clean.id]
    assert engine.usage().kv_bytes == 0


def test_kv_that_held_a_nan_is_clean_for_the_next_owner(device, expected):
    engine = make_engine(device=device, kv_bytes=SHAPES["b"].block_bytes * 26)
    engine._weights.models["a"].poison_token = 95
    runner = Runner(engine)
    runner.submit(make_request("bad", [95] * 300))
    runner.act(Prefill("a", ("bad",)))
    engine._weights.models["a"].poison_token = None
    clean = mates()[4]
    runner.submit(clean)
    assert runner.finish()[clean.id] == expected[clean.id]


def test_bad_requests_are_refused_with_their_reason(device):
    engine = make_engine(device=device, kv_bytes=SHAPES["b"].block_bytes * 26)
    for changes, error in (
        ({"prompt": []}, InvalidRequest),
        ({"prompt": [VOCAB]}, InvalidRequest),
        ({"prompt": [1], "model": "nobody"}, InvalidRequest),
        ({"prompt": [1], "max_tokens": 0}, InvalidRequest),
        ({"prompt": prompt(CONTEXT)}, ContextLengthExceeded),
        ({"prompt": prompt(300), "max_tokens": 500, "model": "b"}, OutOfBlocks),
    ):
        with pytest.raises(error):
            engine.submit(make_request("r", **changes))
    assert engine.usage().kv_bytes == 0


def test_release_frees_the_kv_in_every_state(device):
    engine = make_engine(device=device)
    engine.release("unknown")
    engine.submit(make_request("r", prompt(40)))
    engine.release("r")
    engine.submit(make_request("r", prompt(40)))
    engine.execute(Prefill("a", ("r",)))
    assert engine.usage().kv_bytes == 3 * SHAPES["a"].block_bytes
    engine.execute(Switch("b"))
    engine.release("r")
    assert all_kv_bytes(engine) == 0


def test_the_oldest_request_keeps_its_kv_and_the_youngest_yields(device):
    engine = make_engine(device=device, kv_bytes=SHAPES["b"].block_bytes * 26)
    runner = Runner(engine)
    room = engine._kv.pool.capacity_blocks(SHAPES["b"])
    runner.submit(make_request("old", prompt(16 * 10 - 1), model="b", max_tokens=100))
    runner.submit(make_request("young", prompt(16 * (room - 10)), model="b", max_tokens=2))
    assert not runner.act(Prefill("b", ("old", "young"))).preempted
    assert not runner.act(Decode("b", ("old",))).preempted
    outcome = runner.act(Decode("b", ("old",)))
    # It is only told of where its KV is nowhere.
    assert outcome.preempted == (("young",) if device == "cpu" else ())
    assert [token.request_id for token in outcome.tokens] == ["old"]
    outcome = runner.act(Prefill("b", ("young",)))
    assert outcome.preempted == ("young",)
    assert "KV blocks" in outcome.shortage and "raise --kv-budget-gb" in outcome.shortage


def test_a_model_that_fails_to_load_harms_no_other(device):
    def loader(path, device):
        if path == "b":
            raise OSError("disk on fire")
        return load_tiny(path, device)

    engine = make_engine(device=device, loader=loader, load=False)
    load_in_thread(engine, "a")
    outcome = engine.load(Load("b"))
    assert isinstance(outcome, LoadFailed) and "disk on fire" in outcome.message
    assert isinstance(engine.execute(Switch("a")), Switched)
    assert engine.execute(Switch("b")) == WeightsLost("b")


def test_a_model_evicted_after_its_turn_and_loaded_again_gives_the_same_tokens(device, expected):
    engine = make_engine(device=device)
    engine.execute(Switch("a"))
    runner = Runner(engine)
    first = mates()[0]
    runner.submit(first)
    runner.act(Prefill("a", (first.id,)))
    engine.load(Load("b", evict=("a",)))
    assert engine.execute(Decode("a", (first.id,))) == WeightsLost("a")
    engine.load(Load("a"))
    assert runner.finish()[first.id] == expected[first.id]


def test_a_closed_engine_holds_nothing(device):
    engine = make_engine(device=device)
    engine.submit(make_request("r", prompt(40)))
    engine.execute(Prefill("a", ("r",)))
    engine.execute(Switch("b"))  # what "r" leaves behind is on its way, perhaps
    engine.close()
    engine.close()
    assert (engine.usage().weight_bytes, all_kv_bytes(engine)) == (0, 0)
