"""The contract of every live policy, against a scripted device: whole runs, then decisions."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aegaeon.errors import BudgetTooSmall, ModelNotFound, Overloaded
from aegaeon.metrics import Target
from aegaeon.scheduler.residency import Residency
from aegaeon.types import Decode, Idle, Load, Loaded, LoadFailed, Prefill, Switch, WeightsLost
from tests.support.policies import PREFETCHING, SHARING, make_scheduler
from tests.support.scripted import LOAD_S, SHORTAGE, STEP_S, SWITCH_S, ScriptedDevice
from tests.support.specs import make_request

MODELS = ("a", "b", "c", "d")
STARVES_S = 120.0  # every model gets on within that, however overloaded the device is


def make_device(
    policy: str, sizes: dict[str, int], budget_bytes: int, *, device: dict | None = None, **options
) -> ScriptedDevice:
    scheduler = make_scheduler(policy, sizes, budget_bytes, **options)
    return ScriptedDevice(scheduler, sizes, budget_bytes, **(device or {}))


events = st.lists(
    st.tuples(
        st.sampled_from(["submit", "submit", "submit", "cancel"]),
        st.sampled_from(MODELS),
        st.integers(1, 40),  # tokens
        st.floats(0, 0.5),  # time until the next event
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=100)
@given(
    events,
    st.lists(st.integers(1, 4), min_size=4, max_size=4),
    st.integers(4, 10),
    st.integers(1, 6),
    st.sets(st.sampled_from(MODELS), max_size=1),
)
def test_every_request_ends_exactly_once(policy, trace, sizes, budget, kv_slots, failing):
    device = make_device(
        policy,
        dict(zip(MODELS, sizes, strict=True)),
        budget,
        device={"kv_slots": kv_slots, "failing": frozenset(failing)},
        max_batch=3,
        max_running=5,
    )
    submitted = []
    for number, (what, model, tokens, wait_s) in enumerate(trace):
        if what == "submit":
            submitted.append(f"r{number}")
            device.submit(make_request(f"r{number}", model, max_tokens=tokens))
        elif submitted:
            device.cancel(submitted[tokens % len(submitted)])
        device.advance(device.now + wait_s)
    work_s = sum(tokens for _, _, tokens, _ in trace) * (STEP_S + 2 * SWITCH_S + 2 * LOAD_S)
    device.advance(device.now + 600.0 + 2 * work_s)
    assert sorted(device.ends) == sorted(submitted)
    snapshot = device.scheduler.snapshot()
    assert not snapshot.waiting and not snapshot.running


@pytest.mark.parametrize("policy", SHARING)
@pytest.mark.parametrize(
    "tbt_s", [0.1, pytest.param(0.03, marks=pytest.mark.thorough), 0.005, 0.0001]
)  # a step takes 0.02
@settings(max_examples=8)
@given(
    st.lists(st.integers(1, 4), min_size=4, max_size=4),
    st.integers(4, 10),
    st.lists(st.floats(0, 3.0), min_size=4, max_size=4),
)
def test_no_model_starves(policy, tbt_s, sizes, budget, arrivals):
    """Each model always has more than it can do; whatever is promised, all get on, but for those
    that are ahead of it."""
    sizes = dict(zip(MODELS, sizes, strict=True))
    device = make_device(policy, sizes, budget, target=Target(10.0, tbt_s))
    for arrival_s, model in sorted(zip(arrivals, MODELS, strict=True)):
        device.advance(arrival_s)
        device.submit(make_request(model, model, max_tokens=10**9))
        device.submit(make_request(f"{model}2", model, max_tokens=10**9))
    device.advance(device.now + STARVES_S)
    seen = len(device.steps)
    assert set(device.first_token_s) == {*MODELS, *(f"{model}2" for model in MODELS)}
    for _ in range(3):
        device.advance(device.now + STARVES_S)
        ahead = {
            model
            for model in MODELS
            if device.first_token_s[model] + device.made[model] * tbt_s > device.now
        }
        assert {step.model for step in device.steps[seen:]} | ahead == set(MODELS)
        seen = len(device.steps)


@pytest.mark.parametrize("policy", SHARING)
def test_turns_are_worth_their_loads(policy):
    device = make_device(policy, {"a": 1, "b": 1}, 1)
    for model in "ab":
        device.submit(make_request(model, model, max_tokens=10**9))
    device.advance(60.0)
    assert len(device.steps) * STEP_S > 0.55 * device.now
    assert device.scheduler.snapshot().switches > 20


def test_one_model_keeps_the_device_while_nobody_else_waits(policy):
    device = make_device(policy, {"a": 1, "b": 1}, 2)
    device.submit(make_request("r", "a", max_tokens=10**9))
    device.advance(10.0)
    assert device.scheduler.snapshot().switches == 1


@pytest.mark.parametrize("policy", PREFETCHING)
def test_a_resident_model_computes_while_another_loads(policy):
    device = make_device(policy, {"a": 1, "b": 1}, 2)
    device.submit(make_request("r", "a", max_tokens=10**9))
    device.advance(1.0)
    device.submit(make_request("s", "b"))
    before = len(device.steps)
    device.advance(device.now + LOAD_S)
    assert device.loads[-1] == Load("b")
    assert len(device.steps) - before >= LOAD_S / STEP_S - 1


@pytest.mark.parametrize("policy", SHARING)
def test_a_large_model_is_not_passed_over_by_two_small_ones(policy):
    device = make_device(policy, {"a": 1, "b": 1, "big": 2}, 2)
    for model in ("a", "b", "big"):
        device.submit(make_request(model, model, max_tokens=10**9))
    device.advance(30.0)
    assert {"a", "b", "big"} == set(device.first_token_s)


@pytest.mark.parametrize("policy", PREFETCHING)
def test_idle_models_are_evicted_first_and_the_least_recently_used_of_them(policy):
    device = make_device(policy, {"a": 1, "b": 1, "c": 1, "d": 1}, 3)
    for model in ("b", "a"):
        device.submit(make_request(model, model))
        device.advance(device.now + 2.0)
    device.submit(make_request("c", "c", max_tokens=10**9))
    device.advance(device.now + 1.0)
    device.submit(make_request("d", "d"))
    device.advance(device.now + 1.0)
    assert device.loads[-1] == Load("d", ("b",))


@pytest.mark.parametrize("policy", PREFETCHING)
def test_more_running_requests_than_the_batch_take_turns(policy):
    device = make_device(policy, {"a": 1}, 1, max_batch=2, max_running=5)
    for number in range(5):
        device.submit(make_request(f"r{number}", "a", max_tokens=10**6))
    device.advance(10.0)
    counts = [device.made[f"r{number}"] for number in range(5)]
    assert max(counts) - min(counts) <= 4
    assert all(len(s.requests) <= 2 for s in device.steps if isinstance(s, Decode))


def test_a_prefill_is_bounded_in_tokens_but_takes_at_least_one_request(policy):
    device = make_device(policy, {"a": 1}, 1, prefill_tokens=10)
    for number in range(3):
        device.submit(make_request(f"r{number}", "a", prompt_token_ids=(1,) * 20))
    device.advance(5.0)
    prefills = [step for step in device.steps if isinstance(step, Prefill)]
    assert [step.requests for step in prefills] == [("r0",), ("r1",), ("r2",)]


def test_a_failed_load_drops_its_requests_and_is_tried_again_later(policy):
    device = make_device(policy, {"a": 1}, 1, device={"failing": frozenset("a")})
    device.submit(make_request("r", "a"))
    device.advance(0.5)
    assert device.ends == {"r": "failed"}
    device.submit(make_request("s", "a"))
    action = device.scheduler.next_action(device.now)
    assert isinstance(action, Idle) and action.until_s == pytest.approx(LOAD_S + 1.0)
    assert device.scheduler.next_load(device.now) is None
    device.failing = frozenset()
    device.advance(action.until_s)
    device.advance(device.now + 2.0)
    assert device.ends["s"] == "finished"


def test_overload_and_unknown_models_are_refused(policy):
    device = make_device(policy, {"a": 1}, 1, max_waiting=2)
    device.submit(make_request("r", "a"))
    device.submit(make_request("s", "a"))
    with pytest.raises(Overloaded, match="2 requests are waiting"):
        device.submit(make_request("t", "a"))
    with pytest.raises(ModelNotFound, match="zzz"):
        device.submit(make_request("t", "zzz"))


def test_a_model_that_never_fits_is_refused_with_the_numbers():
    with pytest.raises(BudgetTooSmall, match=r"2\.00 GB .* 1\.00 GB; raise"):
        Residency({"a": 2 * 10**9}, 10**9)


def test_preloads_fill_free_room_and_evict_nobody(policy):
    device = make_device(policy, {"a": 1, "b": 2, "c": 1}, 2)
    for _ in range(3):
        device.scheduler.preload(["a", "b", "c"])
    assert device.scheduler.snapshot().preloading == ("a", "b", "c")
    device.advance(5.0)
    assert device.loads == [Load("a"), Load("c")]
    assert device.scheduler.snapshot().preloading == ()


def test_deadlines_are_reported_once(policy):
    device = make_device(policy, {"a": 1}, 1)
    device.submit(make_request("r", "a", deadline_s=1.0))
    device.submit(make_request("s", "a", deadline_s=2.0))
    assert device.scheduler.expired(0.5) == ()
    assert device.scheduler.expired(1.0) == ("r",)
    assert device.scheduler.expired(1.0) == ()
    device.cancel("s")
    assert device.scheduler.expired(3.0) == ()


def test_a_cancel_during_a_switch_leaves_the_device_usable(policy):
    device = make_device(policy, {"a": 1}, 1)
    device.submit(make_request("r", "a"))
    device.advance(LOAD_S)
    assert isinstance(device._compute[1], Switch)
    device.cancel("r")
    device.submit(make_request("s", "a"))
    device.advance(5.0)
    assert device.ends == {"r": "cancelled", "s": "finished"}


def test_scarce_kv_serves_models_in_the_order_they_ran_out(policy):
    device = make_device(policy, {"a": 1, "b": 1}, 2, device={"kv_slots": 1})
    device.submit(make_request("r", "a", max_tokens=30))
    device.advance(1.0)
    device.submit(make_request("s", "b", max_tokens=5))
    device.advance(device.now + 0.5)
    for number in range(5):  # of the model that holds the KV; they came later
        device.submit(make_request(f"t{number}", "a", max_tokens=5))
    device.advance(device.now + 20.0)
    assert list(device.ends)[:2] == ["r", "s"]
    assert len(device.ends) == 7


def test_kv_that_nobody_here_holds_is_asked_for_ever_less_often_and_then_given_up(policy):
    device = make_device(policy, {"a": 1}, 1, device={"kv_slots": 0})
    for name in "rs":
        device.submit(make_request(name, "a"))
    device.advance(60.0)
    assert device.ends == {"r": "given up", "s": "given up"}
    assert device.reasons["r"] == ("overloaded", SHORTAGE)
    assert len(device.steps) < 20
    device.kv_slots = 1
    device.submit(make_request("t", "a"))
    device.advance(62.0)
    assert device.ends["t"] == "finished"


def test_kv_that_others_free_is_found_within_a_second(policy):
    device = make_device(policy, {"a": 1}, 1, device={"kv_slots": 0})
    for name in "rs":
        device.submit(make_request(name, "a"))
    device.advance(6.0)
    device.kv_slots = 1
    device.advance(6.0 + 1.5)
    assert device.ends == {"r": "finished", "s": "finished"}


def test_another_model_is_served_while_one_waits_for_kv_in_vain(policy):
    device = make_device(policy, {"a": 1, "b": 1}, 2, device={"kv_slots": 1})
    device.submit(make_request("r", "a", max_tokens=10**9))
    device.advance(1.0)
    device.kv_slots = 0
    device.drop_kv("r")  # taken back by the system, say
    device.advance(20.0)
    assert device.ends == {"r": "given up"}
    device.kv_slots = 1
    device.submit(make_request("s", "b"))
    device.advance(22.0)
    assert device.ends["s"] == "finished"


@pytest.mark.parametrize("policy", SHARING)
def test_a_preempted_request_of_another_model_waits_in_its_own_group(policy):
    device = make_device(policy, {"a": 1, "b": 1}, 2, device={"kv_slots": 1})
    device.submit(make_request("young", "b", max_tokens=2000))
    device.advance(LOAD_S + SWITCH_S + 3 * STEP_S)
    assert device.scheduler.snapshot().running == {"b": 1}
    # Older in the eyes of the engine, as a request that an earlier attempt brought there.
    device.known = {"old": make_request("old", "a", max_tokens=200), **device.known}
    device.scheduler.submit(device.known["old"], device.now)
    while not device.made["old"]:
        device.advance(device.now + STEP_S)
    assert device.scheduler.snapshot().running == {"a": 1}
    assert device.scheduler.snapshot().waiting == {"b": 1}
    device.advance(device.now + 200.0)
    assert device.ends == {"old": "finished", "young": "finished"}


def test_load_failure_frees_requests_of_its_own_model_only(policy):
    scheduler = make_scheduler(policy, {"a": 1, "b": 1}, 2)
    scheduler.submit(make_request("r", "a"), 0.0)
    scheduler.submit(make_request("s", "b"), 0.0)
    assert scheduler.next_load(0.0) == Load("a")
    scheduler.complete(LoadFailed("a", "x", "y"), 0.1)
    assert scheduler.snapshot().waiting == {"b": 1}


def test_a_load_that_is_put_off_keeps_its_requests_and_lets_others_load(policy):
    scheduler = make_scheduler(policy, {"a": 1, "b": 1}, 1)
    scheduler.submit(make_request("r", "a"), 0.0)
    scheduler.submit(make_request("s", "b"), 0.0)
    assert scheduler.next_load(0.0) == Load("a")
    scheduler.complete(WeightsLost("a"), 3.0)
    assert scheduler.snapshot().waiting == {"a": 1, "b": 1}
    assert scheduler.next_load(3.0) == Load("b")
    scheduler.complete(Loaded("b", 1, 0.1), 3.1)
    scheduler.cancel("s", 3.1)
    assert scheduler.next_load(3.1) is None
    assert scheduler.next_load(4.1) == Load("a", ("b",))
