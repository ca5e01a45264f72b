"""The policy `request` against a scripted device: queues, drops, and who goes where."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aegaeon.scheduler.ledger import Limits
from aegaeon.scheduler.request import RequestDispatcher, RequestRules, RequestScheduler
from aegaeon.scheduler.residency import Residency
from aegaeon.sim.cluster import Gone
from aegaeon.types import Decode, Load, Loaded, Prefill
from tests.scheduler.test_paper import events, play, run_out
from tests.support.scripted import LOAD_S, STEP_S, SWITCH_S, ScriptedDevice
from tests.support.specs import make_request

MODELS = ("a", "b", "c", "d")
RULES = RequestRules()
TAIL = RequestRules(serves_tail=True)
WAITING = RequestRules(counts_running=False)
COMPUTED = RequestRules(used_is_computed=True)


def make_scheduler(*, budget_bytes=4, rules=RULES, role="colocated", **limits):
    residency = Residency(dict.fromkeys(MODELS, 1), budget_bytes)
    return RequestScheduler(residency, MODELS, Limits(**limits), role, rules)


def make_device(**settings):
    budget_bytes = settings.get("budget_bytes", 4)
    return ScriptedDevice(make_scheduler(**settings), dict.fromkeys(MODELS, 1), budget_bytes)


def models_of(steps):
    models = [step.model for step in steps]
    return [m for n, m in enumerate(models) if not n or models[n - 1] != m]


def test_a_queue_is_served_in_order_and_nobody_is_preempted():
    device = make_device()
    for number, model in enumerate("abac"):
        device.submit(make_request(f"r{number}", model, max_tokens=50))
    device.advance(30.0)
    assert models_of(device.steps) == list("abac")
    assert list(device.ends) == ["r0", "r1", "r2", "r3"]


def test_requests_of_the_front_model_are_prefilled_then_decoded_together():
    device = make_device(prefill_requests=4)
    for number in range(3):
        device.submit(make_request(f"r{number}", "a", max_tokens=3))
    device.advance(5.0)
    everyone = ("r0", "r1", "r2")
    assert [(type(step), step.requests) for step in device.steps] == [
        (Prefill, everyone),
        (Decode, everyone),
        (Decode, everyone),
    ]


def test_a_request_of_the_front_model_joins_while_nobody_stands_between():
    device = make_device()
    device.submit(make_request("r", "a", max_tokens=100))
    device.advance(LOAD_S + SWITCH_S + 5 * STEP_S)
    device.submit(make_request("s", "a", max_tokens=100))
    device.submit(make_request("t", "b"))
    device.submit(make_request("u", "a"))
    device.advance(device.now + 2 * STEP_S)
    assert device.made["s"] and not device.made["u"]
    device.advance(30.0)
    assert list(device.ends) == ["r", "s", "t", "u"]


def test_a_switch_waits_for_the_whole_load_and_drops_all_others():
    device = make_device(budget_bytes=4)
    device.submit(make_request("r", "a", max_tokens=50))
    device.submit(make_request("s", "b", max_tokens=50))
    device.advance(LOAD_S + SWITCH_S + 49 * STEP_S)
    assert device.loads == [Load("a")]  # nothing is prefetched
    device.advance(device.now + 2 * STEP_S)
    assert device.loads == [Load("a"), Load("b", ("a",))]


def test_an_idle_device_keeps_its_model():
    device = make_device()
    for name in "rs":
        device.submit(make_request(name, "a"))
        device.advance(device.now + 10.0)
    assert device.loads == [Load("a")]


def test_a_request_without_a_token_after_15_s_is_dropped():
    device = make_device()
    device.submit(make_request("r", "a", max_tokens=1000))
    device.submit(make_request("s", "b"))
    device.advance(8.0)
    device.submit(make_request("t", "b", arrival_s=8.0))
    device.advance(15.0 - STEP_S)
    assert not device.ends
    device.advance(15.0 + STEP_S)
    assert device.ends == {"s": "given up"}
    assert device.reasons["s"][0] == "overloaded"
    device.advance(30.0)
    assert device.ends["t"] == "finished"  # it runs beside `r` now, whose queue it stands in
    assert device.ends["r"] == "finished"


def test_the_tail_may_be_served_first_but_nobody_is_preempted():
    device = make_device(rules=TAIL)
    device.submit(make_request("r", "a", max_tokens=50))
    device.advance(LOAD_S + SWITCH_S + STEP_S)
    for name, model in (("s", "b"), ("t", "c")):
        device.submit(make_request(name, model))
    device.advance(20.0)
    assert list(device.ends) == ["r", "t", "s"]


def test_kv_from_elsewhere_comes_as_far_as_there_is_room():
    residency = Residency({"a": 100}, 320, {"a": 1})
    scheduler = RequestScheduler(residency, ("a",), Limits(), "decode")
    for name in "rst":
        scheduler.adopt(make_request(name, "a", prompt_token_ids=(0,) * 90), 0.0)
    assert scheduler.next_load(0.0) == Load("a")
    scheduler.complete(Loaded("a", 100, LOAD_S), LOAD_S)
    assert scheduler.next_load(LOAD_S) == Load("a", bring=("r", "s"))


def dispatched(models, places, dispatcher):
    for number, place in enumerate(places):
        place.name(f"device-{number}")
    sent = []
    for model in models:
        index = dispatcher.dispatch(places, model)
        places[index].submit(make_request(f"{len(sent)}{model}{id(sent)}", model), 0.0)
        sent.append(index)
    return sent


def test_a_model_takes_a_further_device_once_four_stand_in_its_queue():
    places = [make_scheduler() for _ in range(3)]
    assert dispatched("aaaaaa", places, RequestDispatcher()) == [0, 0, 0, 0, 1, 1]


def test_an_idle_device_is_taken_first_then_the_one_used_longest_ago():
    places = [make_scheduler() for _ in range(3)]
    dispatcher = RequestDispatcher()
    assert dispatched("abc", places, dispatcher) == [0, 1, 2]
    assert dispatched("ad", places, dispatcher) == [0, 1]
    places[2].cancel(next(iter(places[2]._model_of)), 0.0)
    assert dispatched("b", places, dispatcher) == [2]


def test_without_other_devices_the_shortest_queue_of_the_model_grows():
    places = [make_scheduler() for _ in range(2)]
    assert dispatched("a" * 10, places, RequestDispatcher()) == [0] * 4 + [1] * 4 + [0, 1]


@pytest.mark.parametrize(("rules", "expected"), [(RULES, [1, 1]), (WAITING, [0, 0])])
def test_those_that_run_need_not_count_as_queued(rules, expected):
    devices = [make_device(rules=rules) for _ in range(2)]
    for number in range(4):
        devices[0].submit(make_request(f"r{number}", "a", max_tokens=1000))
    devices[0].advance(5.0)
    assert [device.scheduler.load for device in devices] == [4 if rules is RULES else 0, 0]
    places = [device.scheduler for device in devices]
    assert dispatched("aa", places, RequestDispatcher(rules)) == expected


@pytest.mark.parametrize(("rules", "expected"), [(RULES, 2), (COMPUTED, 1)])
def test_used_last_may_be_who_computed_last_though_it_loads(rules, expected):
    devices = [make_device(rules=rules) for _ in range(3)]
    devices[0].submit(make_request("r", "a", max_tokens=1000))
    devices[1].submit(make_request("s", "b"))
    devices[2].submit(make_request("t", "c", arrival_s=1.0))
    for device in devices:
        device.advance(5.0)
    devices[2].submit(make_request("u", "c"))
    for device in devices:
        device.advance(10.0)
    devices[1].submit(make_request("v", "c"))
    devices[1].advance(10.0 + LOAD_S / 2)
    places = [device.scheduler for device in devices]
    assert places[0].computed_s > places[2].computed_s > places[1].computed_s > 0
    assert places[1].snapshot().loading == "c"
    assert dispatched("d", places, RequestDispatcher(rules)) == [expected]


def test_where_nobody_says_who_computed_places_take_turns():
    places = [Gone("colocated"), Gone("colocated")]
    for number, place in enumerate(places):
        place.id = f"device-{number}"
    dispatcher = RequestDispatcher(COMPUTED)
    assert [dispatcher.dispatch(places, model) for model in "abc"] == [0, 1, 0]


@settings(max_examples=60)
@given(
    events,
    st.integers(1, 5),
    st.integers(1, 6),
    st.sets(st.sampled_from(MODELS), max_size=1),
    st.sampled_from(["prefill", "decode", "colocated"]),
    st.sampled_from([RULES, TAIL, WAITING, COMPUTED]),
)
def test_every_request_ends_exactly_once(trace, budget, kv_slots, failing, role, rules):
    scheduler = make_scheduler(
        budget_bytes=budget, rules=rules, role=role, max_batch=3, max_running=5
    )
    sizes = dict.fromkeys(MODELS, 1)
    device = ScriptedDevice(scheduler, sizes, budget, kv_slots, frozenset(failing))
    come = play(device, trace, role)
    run_out(device)
    assert sorted(device.ends) == sorted(come)
    snapshot = device.scheduler.snapshot()
    assert not snapshot.waiting and not snapshot.running
    assert not scheduler._queue
