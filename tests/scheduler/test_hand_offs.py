"""The contract of every live policy where requests come and go between instances, and weights go
without asking."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aegaeon.errors import InvalidRequest, Overloaded
from aegaeon.types import (
    Decode,
    Handoff,
    Load,
    Loaded,
    LoadFailed,
    NewToken,
    Prefill,
    Stepped,
    WeightsLost,
)
from tests.support.policies import PREFETCHING, make_scheduler
from tests.support.scripted import LOAD_S, STEP_S, SWITCH_S, ScriptedDevice
from tests.support.specs import make_request

FIRST_S = LOAD_S + SWITCH_S + STEP_S  # from nothing to a first token


def make_device(
    policy, role="colocated", *, models="ab", budget_bytes=2, kv_slots=1 << 30, **options
):
    sizes = dict.fromkeys(models, 1)
    scheduler = make_scheduler(policy, sizes, budget_bytes, role, **options)
    return ScriptedDevice(scheduler, sizes, budget_bytes, kv_slots)


def test_a_prefill_instance_never_decodes(policy):
    device = make_device(policy, "prefill")
    for number in range(6):
        device.submit(make_request(f"r{number}", "ab"[number % 2], max_tokens=9))
    device.advance(5.0)
    assert sorted(device.leaving) == [f"r{number}" for number in range(6)]
    assert not any(isinstance(step, Decode) for step in device.steps)
    assert device.scheduler.snapshot().running == {"a": 3, "b": 3}
    for request_id in tuple(device.leaving):
        device.depart(request_id)
    assert device.scheduler.snapshot().running == {}


def test_a_request_that_ends_with_its_first_token_goes_nowhere(policy):
    device = make_device(policy, "prefill")
    device.submit(make_request("r", "a", max_tokens=1))
    device.advance(5.0)
    assert device.ends == {"r": "finished"} and not device.leaving


def test_a_request_cancelled_before_it_is_handed_off_is_not(policy):
    device = make_device(policy, "prefill")
    device.submit(make_request("r", "a"))
    device.advance(LOAD_S + SWITCH_S)
    device.now += STEP_S
    device.finish()  # the token is there, and nobody has asked yet
    device.cancel("r")
    device.submit(make_request("r", "a", attempt=1))
    assert isinstance(device.scheduler.next_action(device.now), Prefill)


def test_leaving_requests_hold_kv_until_they_are_gone(policy):
    device = make_device(policy, "prefill", kv_slots=1)
    device.submit(make_request("r", "a"))
    device.submit(make_request("s", "a"))
    device.advance(5.0)
    assert device.leaving == ["r"]
    assert len(device.steps) <= 3  # it does not try again and again
    device.depart("r")
    device.advance(10.0)
    assert device.leaving == ["s"]


def test_a_running_request_leaves_holds_its_kv_until_it_is_gone_and_may_come_back(policy):
    device = make_device(policy, kv_slots=2)
    for name in "rst":
        device.submit(make_request(name, "a", max_tokens=40))
    device.advance(FIRST_S + 3 * STEP_S)
    device.parting.add("r")
    device.advance(device.now + 5.0)
    assert device.leaving == ["r"] and device.scheduler.standing_of("r") == "leaving"
    assert device.ends == {"s": "finished", "t": "finished"}
    assert device.scheduler.snapshot().running == {"a": 1}
    device.leaving.remove("r")
    request = device.known["r"]
    device.scheduler.cancel("r", device.now)
    device.scheduler.adopt(request, device.now)
    prefills = sum(isinstance(step, Prefill) for step in device.steps)
    device.advance(device.now + 5.0)
    assert device.ends["r"] == "finished"
    assert sum(isinstance(step, Prefill) for step in device.steps) == prefills


def test_an_adopted_request_decodes_without_a_prefill(policy):
    device = make_device(policy, "decode")
    device.adopt(make_request("r", "a", generated_token_ids=(7,)))
    device.advance(5.0)
    assert device.ends == {"r": "finished"}
    assert all(isinstance(step, Decode) for step in device.steps)


def test_an_adopted_request_that_loses_its_kv_is_prefilled_where_it_is(policy):
    device = make_device(policy, "decode", kv_slots=2)
    device.adopt(make_request("r", "a", max_tokens=20))
    device.adopt(make_request("s", "a", max_tokens=20))
    device.kv_slots = 1
    device.drop_kv("s")
    device.advance(20.0)
    assert device.ends == {"r": "finished", "s": "finished"}
    assert any(isinstance(step, Prefill) and step.requests == ("s",) for step in device.steps)


def test_who_lacks_kv_comes_before_who_arrives(policy):
    device = make_device(policy, "decode", kv_slots=1)
    for name in "rs":
        device.adopt(make_request(name, "a", max_tokens=50))
        device.drop_kv(name)
    device.advance(FIRST_S + STEP_S)
    with pytest.raises(Overloaded, match="wait for KV"):
        device.scheduler.adopt(make_request("t", "a"), device.now)
    device.advance(20.0)
    assert device.ends == {"r": "finished", "s": "finished"}
    device.adopt(make_request("t", "a"))


def test_adopting_is_bounded_and_not_for_prefill_instances(policy):
    with pytest.raises(InvalidRequest, match="does not decode"):
        make_device(policy, "prefill").adopt(make_request("r", "a"))
    device = make_device(policy, "decode", max_waiting=1)
    device.adopt(make_request("r", "a"))
    with pytest.raises(Overloaded):
        device.adopt(make_request("s", "a"))


def test_a_leaving_request_still_has_its_deadline(policy):
    device = make_device(policy, "prefill")
    device.submit(make_request("r", "a", deadline_s=8.0))
    device.advance(5.0)
    assert device.leaving == ["r"]
    assert device.scheduler.expired(8.0) == ("r",)


@pytest.mark.parametrize("stage_s", [LOAD_S + SWITCH_S / 2, FIRST_S - STEP_S / 2, FIRST_S + STEP_S])
def test_lost_weights_are_loaded_again_and_nothing_else_is_lost(policy, stage_s):
    device = make_device(policy)
    device.submit(make_request("r", "a", max_tokens=9))
    device.advance(stage_s)
    device.lose("a")
    device.advance(10.0)
    assert device.ends == {"r": "finished"} and device.made["r"] == 9
    assert device.loads == [Load("a"), Load("a")]


@pytest.mark.parametrize("policy", PREFETCHING)
def test_a_load_tells_of_models_that_made_room(policy):
    scheduler = make_scheduler(policy, {"a": 1, "b": 1}, 2)
    scheduler.submit(make_request("r", "a"), 0.0)
    assert scheduler.next_load(0.0) == Load("a")
    scheduler.complete(Loaded("a", 1, 0.1), 0.1)
    scheduler.submit(make_request("s", "b"), 0.1)
    assert scheduler.next_load(0.1) == Load("b")
    scheduler.complete(Loaded("b", 1, 0.1, evicted=("a",)), 0.2)
    assert scheduler.snapshot().resident == ("b",)
    assert scheduler.next_load(0.2) == Load("a")


@pytest.mark.parametrize("policy", PREFETCHING)
def test_a_current_model_that_is_evicted_ends_its_turn(policy):
    device = make_device(policy)
    device.submit(make_request("r", "a", max_tokens=10**6))
    device.advance(FIRST_S + 3 * STEP_S)
    device.submit(make_request("s", "b", max_tokens=10**6))
    assert device.scheduler.snapshot().current == "a"
    device.ask()
    device.scheduler.complete(Loaded("b", 1, LOAD_S, evicted=("a",)), device.now)
    assert device.scheduler.snapshot().current is None
    assert device.scheduler.next_load(device.now) is None  # a's action is still under way
    device.scheduler.complete(Stepped("a", (NewToken("r", 7),), STEP_S), device.now)
    assert device.scheduler.snapshot().resident == ("b",)
    assert device.scheduler.next_load(device.now) == Load("a")


def test_a_load_that_fails_while_its_first_layers_compute_fails_its_requests_only(policy):
    device = make_device(policy)
    for name in "ab":
        device.submit(make_request(name, name, max_tokens=200))
    device.advance(2 * LOAD_S + SWITCH_S)
    model = device.scheduler.snapshot().current
    device.troubles[model] = LoadFailed(model, "checkpoint_error", "layer 17")
    device.advance(device.now + 1.0)
    assert device.ends == {model: "failed"}
    device.submit(make_request("again", model))
    device.advance(device.now + 30.0)
    assert device.ends["again"] == "finished" and set("ab") <= set(device.ends)


events = st.lists(
    st.tuples(
        st.sampled_from(
            ["submit", "submit", "submit", "adopt", "cancel", "depart", "lose", "part"]
        ),
        st.sampled_from("abc"),
        st.integers(1, 30),  # tokens
        st.floats(0, 0.5),  # time until the next event
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=100)
@given(events, st.sampled_from(["prefill", "decode", "colocated"]), st.integers(1, 6))
def test_every_request_ends_or_leaves_whatever_goes_away(policy, trace, role, kv_slots):
    device = make_device(policy, role, models="abc", kv_slots=kv_slots, max_batch=3)
    came = []
    for number, (what, model, tokens, wait_s) in enumerate(trace):
        request = make_request(f"r{number}", model, max_tokens=tokens)
        if what == "submit":
            device.submit(request)
            came.append(request.id)
        elif what == "adopt" and role != "prefill" and len(device.holders) < kv_slots:
            try:
                device.adopt(request)
                came.append(request.id)
            except Overloaded:
                pass
        elif what == "cancel" and came:
            name = came[tokens % len(came)]
            if name not in device.leaving:
                device.cancel(name)
        elif what == "part" and came:
            device.parting.add(came[tokens % len(came)])
        elif what == "depart" and device.leaving:
            device.depart(device.leaving[0])
        elif what == "lose" and model in device.resident:
            device.lose(model)
        device.advance(device.now + wait_s)
    for _ in range(len(trace) + 1):
        for name in tuple(device.leaving):
            device.depart(name)
        device.advance(device.now + 60.0)
    assert sorted(device.ends) == sorted(came)
    snapshot = device.scheduler.snapshot()
    assert not snapshot.waiting and not snapshot.running


def test_an_action_whose_outcome_is_lost_weights_leaves_the_lane_free(policy):
    scheduler = make_scheduler(policy, {"a": 1}, 1, "prefill")
    scheduler.submit(make_request("r", "a"), 0.0)
    scheduler.next_load(0.0)
    scheduler.complete(Loaded("a", 1, 0.1), 0.1)
    scheduler.next_action(0.1)
    scheduler.complete(WeightsLost("a"), 0.2)
    assert not isinstance(scheduler.next_action(0.2), Handoff)
    assert scheduler.next_load(0.2) == Load("a")
