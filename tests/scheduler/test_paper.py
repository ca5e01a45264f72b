"""The policy `paper` against a scripted device: its two algorithms, then whole runs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aegaeon.errors import InvalidRequest
from aegaeon.metrics import Target
from aegaeon.scheduler.cost import Costs, ModelCost
from aegaeon.scheduler.ledger import Limits
from aegaeon.scheduler.paper import PaperDispatcher, PaperRules, quotas
from aegaeon.scheduler.paper_decode import PaperDecode
from aegaeon.scheduler.paper_prefill import PaperPrefill
from aegaeon.scheduler.residency import Residency
from aegaeon.types import Decode, Load, Loaded, LoadFailed, Prefill, Ran, Switch, Switched
from tests.support.scripted import LOAD_S, STEP_S, SWITCH_S, ScriptedDevice
from tests.support.specs import make_request

MODELS = ("a", "b", "c", "d")
RULES = PaperRules()
KEEPS = PaperRules(keeps_resident=True)


def make_scheduler(role="decode", *, models=MODELS, budget_bytes=2, kv=None, rules=RULES, **limits):
    cost = ModelCost(LOAD_S, 0.0, 4096, (0.0, 0.0, STEP_S), (0.0, 0.0, STEP_S))
    costs = Costs(1.0, 100.0, dict.fromkeys(models, cost), tuple(models))
    residency = Residency(dict.fromkeys(models, 1 if kv is None else 100), budget_bytes, kv)
    kind = PaperPrefill if role == "prefill" else PaperDecode
    return kind(residency, costs, Limits(**limits), role, Target(), rules)


def make_device(role="decode", *, device=None, sizes=None, **settings):
    scheduler = make_scheduler(role, **settings)
    budget_bytes = settings.get("budget_bytes", 2)
    return ScriptedDevice(
        scheduler, sizes or dict.fromkeys(MODELS, 1), budget_bytes, **device or {}
    )


# Quotas


def test_three_batches_of_25_ms_have_turns_of_3_s():
    """The paper's example; it holds with a longest turn of 3 s, which makes alpha 1."""
    rules = PaperRules(longest_turn_s=3.0)
    shares = quotas((0.025,) * 3, 3.0, 0.1, rules)
    assert shares == pytest.approx((3.0, 3.0, 3.0))
    assert shares[0] / 0.025 == pytest.approx(120)  # tokens, of 0.1 s each
    assert 3.0 + sum(shares) == pytest.approx(120 * 0.1)  # alpha 1: a round takes what it makes


def test_the_longest_turn_bounds_alpha_from_below():
    shares = quotas((0.025,) * 3, 3.0, 0.1, RULES)
    assert shares == pytest.approx((4.0,) * 3)  # alpha is 15/16


def test_alpha_is_never_below_a_half():
    assert quotas((0.01,), 1.0, 0.1, RULES) == pytest.approx((1.0 / (10 * (0.5 - 0.1)),))


def test_quotas_without_switches_are_the_longest():
    assert quotas((0.06, 0.03), 0.0, 0.1, RULES) == pytest.approx((4.0, 2.0))


@given(st.lists(st.floats(0.001, 0.5), min_size=1, max_size=20), st.floats(0.01, 30.0))
def test_a_turn_makes_tokens_for_the_same_time_whoever_has_it(steps_s, switch_s):
    shares = quotas(steps_s, switch_s, 0.1, RULES)
    lasts_s = [quota_s * 0.1 / step_s for quota_s, step_s in zip(shares, steps_s, strict=True)]
    assert lasts_s == pytest.approx([lasts_s[0]] * len(lasts_s))
    assert all(0 < quota_s <= 4.0 * (1 + 1e-6) for quota_s in shares)
    if sum(steps_s) < 5.0:
        busy = sum(steps_s) / 0.1
        alpha = max(switch_s * max(steps_s) / 0.1 / 4.0 + busy, 0.5)
        assert switch_s + sum(shares) == pytest.approx(alpha * lasts_s[0], rel=1e-3)


# Grouped prefill


def prefills(device):
    return [step.requests for step in device.steps if isinstance(step, Prefill)]


def test_a_group_runs_one_request_at_a_time():
    device = make_device("prefill")
    for number in range(3):
        device.submit(make_request(f"r{number}", "a"))
    device.advance(5.0)
    assert prefills(device) == [("r0",), ("r1",), ("r2",)]
    assert device.leaving == ["r0", "r1", "r2"]


def test_a_group_takes_eight_whatever_has_run_of_it():
    device = make_device("prefill")
    device.submit(make_request("a0", "a"))
    device.submit(make_request("b0", "b"))
    for number in range(1, 7):
        device.submit(make_request(f"a{number}", "a"))
    device.advance(LOAD_S + SWITCH_S + 4.5 * STEP_S)
    assert len(device.leaving) == 4
    device.submit(make_request("a7", "a"))  # the eighth
    device.submit(make_request("a8", "a"))
    device.advance(10.0)
    assert device.leaving == [*(f"a{n}" for n in range(8)), "b0", "a8"]


def test_the_next_groups_model_is_loaded_while_the_front_one_computes():
    device = make_device("prefill", rules=PaperRules(max_group=40))
    for number in range(40):
        device.submit(make_request(f"a{number}", "a"))
    device.submit(make_request("b0", "b"))
    device.advance(LOAD_S + SWITCH_S)
    assert device.loads == [Load("a"), Load("b")]
    device.submit(make_request("c0", "c"))
    device.advance(LOAD_S + SWITCH_S + 39 * STEP_S)
    assert device.loads == [Load("a"), Load("b")]  # not the one after that
    device.advance(10.0)
    assert device.loads[2:] == [Load("c", ("a",))]


def test_the_load_is_the_seconds_of_the_line_with_its_switches():
    scheduler = make_scheduler("prefill")
    for number, model in enumerate("aabab"):
        scheduler.submit(make_request(f"r{number}", model), 0.0)
    assert scheduler.load == pytest.approx(2 * LOAD_S + 5 * STEP_S)  # groups a, b
    counting = make_scheduler("prefill", rules=PaperRules(load_counts_groups=True))
    counting.submit(make_request("r", "a"), 0.0)
    assert counting.load == 1


def test_a_request_joins_the_first_group_with_room_anywhere():
    places = [make_scheduler("prefill"), make_scheduler("prefill")]
    dispatcher = PaperDispatcher()
    sent = []
    for number, model in enumerate("abaab" + "a" * 7):
        index = dispatcher.dispatch(places, model)
        places[index].submit(make_request(f"r{number}", model), 0.0)
        sent.append(index)
    assert sent[:5] == [0, 1, 0, 0, 1]
    assert sent[5:10] == [0] * 5
    assert sent[10:] == [1, 1]  # the group is full: a new one where there is less to do


def test_a_cancelled_request_still_counts_in_its_group():
    scheduler = make_scheduler("prefill", rules=PaperRules(max_group=2))
    scheduler.submit(make_request("r", "a"), 0.0)
    scheduler.submit(make_request("s", "a"), 0.0)
    scheduler.cancel("s", 0.0)
    assert not scheduler.joins("a")
    scheduler.cancel("r", 0.0)
    assert scheduler.load == 0


def test_a_prefill_device_does_not_decode():
    with pytest.raises(InvalidRequest):
        make_scheduler("prefill").adopt(make_request("r", "a"), 0.0)


# Turns


def turns(device):
    """The models that decoded, one after the other."""
    models = [step.model for step in device.steps if isinstance(step, Decode)]
    return [m for n, m in enumerate(models) if not n or models[n - 1] != m]


def test_batches_have_turns_in_rounds():
    device = make_device(budget_bytes=2)
    for model in "abc":
        device.adopt(make_request(model, model, max_tokens=10**6))
    device.advance(60.0)
    assert turns(device)[:9] == list("abcabcabc")
    counts = [device.made[model] for model in "abc"]
    assert max(counts) - min(counts) < max(counts) / 3


def test_the_quota_counts_from_the_end_of_the_first_step():
    scheduler = make_scheduler()
    scheduler.adopt(make_request("r", "a", max_tokens=10**6), 0.0)
    scheduler.next_action(0.0)
    assert scheduler.next_load(0.0) == Load("a")
    scheduler.complete(Loaded("a", 1, LOAD_S), LOAD_S)
    assert scheduler.next_action(LOAD_S) == Switch("a")
    scheduler.complete(Switched("a", 0.0), 1.0)
    first = scheduler.next_action(1.0)
    assert isinstance(first, Decode) and first.stretch.steps == 1
    scheduler.complete(Ran("a", 1, (), 0.5), 1.5)
    then = scheduler.next_action(1.5)
    quota_s = quotas((STEP_S,), LOAD_S, 0.1, RULES)[0]
    assert then.stretch.until_s == pytest.approx(1.5 + quota_s)


def test_one_batch_alone_keeps_the_device_and_its_weights():
    device = make_device()
    device.adopt(make_request("r", "a", max_tokens=10**6))
    device.advance(30.0)
    assert device.scheduler.snapshot().switches == 1
    assert device.loads == [Load("a")]


def test_what_comes_joins_a_batch_of_its_model():
    device = make_device()
    device.adopt(make_request("r", "a", max_tokens=10**6))
    device.advance(1.0)
    device.adopt(make_request("s", "a", max_tokens=10**6))
    device.advance(1.0 + 2 * STEP_S)
    assert device.scheduler.load == 1
    assert device.steps[-1].requests == ("r", "s")


def test_a_new_batch_has_its_first_turn_in_the_round_under_way():
    for rules, expected in ((RULES, "abcabc"), (PaperRules(joins_round=False), "ababcabc")):
        device = make_device(rules=rules)
        for model in "ab":
            device.adopt(make_request(model, model, max_tokens=10**6))
        device.advance(LOAD_S + SWITCH_S + 2 * STEP_S)
        device.adopt(make_request("c", "c", max_tokens=10**6))
        device.advance(60.0)
        assert "".join(turns(device)).startswith(expected)


def test_weights_go_with_the_turn_unless_they_are_to_stay():
    for rules, loads in ((RULES, 10), (KEEPS, 2)):
        device = make_device(budget_bytes=2, rules=rules)
        for model in "ab":
            device.adopt(make_request(model, model, max_tokens=10**6))
        device.advance(60.0)
        assert (len(device.loads) >= loads) if rules is RULES else (len(device.loads) == loads)


def test_a_prefilled_request_goes_where_its_model_has_room_or_batches_are_fewest():
    places = [make_scheduler(max_batch=2), make_scheduler(max_batch=2)]
    dispatcher = PaperDispatcher()
    sent = []
    for number, model in enumerate("abcaa"):
        index = dispatcher.dispatch_prefilled(places, model)
        places[index].adopt(make_request(f"r{number}", model), 0.0)
        sent.append(index)
    assert sent == [0, 1, 0, 0, 1]


def test_kv_that_is_too_much_for_one_batch_makes_another():
    scheduler = make_scheduler(kv=dict.fromkeys(MODELS, 1), budget_bytes=400)
    for number in range(3):  # 300 bytes beside its weights, half of them for a batch
        scheduler.adopt(make_request(f"r{number}", "a", prompt_token_ids=(0,) * 90), 0.0)
    assert scheduler.load == 3
    scheduler.adopt(make_request("s", "a", prompt_token_ids=(0,) * 40), 0.0)
    assert scheduler.load == 3


def run_load(scheduler, load, at_s):
    assert scheduler.next_load(at_s) == load
    scheduler.complete(Loaded(load.model, 100, LOAD_S), at_s)


def test_kv_comes_with_the_turn_and_goes_when_it_is_over():
    scheduler = make_scheduler(kv=dict.fromkeys(MODELS, 1), budget_bytes=400)
    for model in "ab":
        scheduler.adopt(make_request(model, model, max_tokens=10**6), 0.0)
    scheduler.next_action(0.0)
    run_load(scheduler, Load("a", bring=("a",)), 0.3)
    assert scheduler.next_action(0.3) == Switch("a")
    run_load(scheduler, Load("b", bring=("b",)), 0.6)
    scheduler.complete(Switched("a", 0.0), 0.6)
    assert isinstance(scheduler.next_action(0.6), Decode)
    scheduler.complete(Ran("a", 1, (), 0.1), 0.7)
    assert scheduler.next_action(50.0) == Switch("b")
    scheduler.complete(Switched("b", 0.0), 50.0)
    assert isinstance(scheduler.next_action(50.0), Decode)
    run_load(scheduler, Load("b", offload=("a",)), 50.0)
    run_load(scheduler, Load("a", ("a",), bring=("a",)), 50.0)


def test_a_colocated_turn_prefills_first_and_at_most_a_group():
    device = make_device("colocated")
    for number in range(10):
        device.submit(make_request(f"r{number}", "a", max_tokens=10**6))
    device.submit(make_request("s", "b", max_tokens=10**6))
    device.advance(2.0)
    assert prefills(device)[:8] == [(f"r{number}",) for number in range(8)]
    assert isinstance(device.steps[8], Decode)
    device.advance(30.0)
    assert all(device.made[f"r{number}"] for number in range(10))


# Whole runs

events = st.lists(
    st.tuples(
        st.sampled_from(["come", "come", "come", "cancel", "lose"]),
        st.sampled_from(MODELS),
        st.integers(1, 40),  # tokens
        st.floats(0, 0.5),  # time until the next event
    ),
    min_size=1,
    max_size=40,
)


def play(device, trace, role):
    """Let `trace` happen; return whom it brought."""
    come = []
    for number, (what, model, tokens, wait_s) in enumerate(trace):
        name = f"r{number}"
        if what == "come":
            request = make_request(name, model, max_tokens=tokens, arrival_s=device.now)
            if role == "decode" and device.scheduler._kv.first() is None:
                device.adopt(request)
            else:
                device.submit(request)
            come.append(name)
        elif what == "cancel" and come:
            device.cancel(come[tokens % len(come)])
        elif what == "lose" and model in device.resident:
            device.lose(model)
        device.advance(device.now + wait_s)
        depart_all(device)
    return come


def depart_all(device):
    for name in tuple(device.leaving):
        device.depart(name)


def run_out(device):
    for _ in range(400):
        device.advance(device.now + 1.0)
        depart_all(device)
        if not device.known:
            break


@settings(max_examples=60)
@given(
    events,
    st.integers(2, 5),
    st.integers(1, 6),
    st.sets(st.sampled_from(MODELS), max_size=1),
    st.sampled_from(["prefill", "decode", "colocated"]),
    st.sampled_from([RULES, KEEPS, PaperRules(joins_round=False, max_group=2)]),
)
def test_every_request_ends_exactly_once(trace, budget, kv_slots, failing, role, rules):
    scheduler = make_scheduler(role, budget_bytes=budget, rules=rules, max_batch=3, max_running=5)
    sizes = dict.fromkeys(MODELS, 1)
    device = ScriptedDevice(scheduler, sizes, budget, kv_slots, frozenset(failing))
    come = play(device, trace, role)
    run_out(device)
    assert sorted(device.ends) == sorted(come)
    snapshot = device.scheduler.snapshot()
    assert not snapshot.waiting and not snapshot.running
    assert device.scheduler.load == 0


def test_a_failed_load_is_tried_again_later_while_others_have_turns():
    device = make_device("colocated", device={"failing": frozenset("a")})
    device.submit(make_request("r", "a"))
    device.advance(0.5)
    assert device.ends == {"r": "failed"}
    device.submit(make_request("s", "a"))
    device.submit(make_request("t", "b"))
    device.failing = frozenset()
    device.advance(LOAD_S + 1.0)
    assert device.ends == {"r": "failed", "t": "finished"}
    device.advance(10.0)
    assert device.ends["s"] == "finished"


def test_a_load_failure_ends_the_turn():
    scheduler = make_scheduler()
    scheduler.adopt(make_request("r", "a"), 0.0)
    scheduler.next_action(0.0)
    assert scheduler.next_load(0.0) == Load("a")
    scheduler.complete(LoadFailed("a", "x", "y"), 0.1)
    assert scheduler.load == 0
    scheduler.adopt(make_request("s", "b"), 0.1)
    scheduler.next_action(0.1)
    assert scheduler.next_load(0.1) == Load("b")
