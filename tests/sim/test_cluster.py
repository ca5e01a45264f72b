"""Whole simulated runs: nothing is lost, nothing overflows, and the same comes out twice."""

import dataclasses
import math
from collections import defaultdict
from itertools import pairwise

import pytest

from aegaeon.errors import ConfigError
from aegaeon.metrics import Target
from aegaeon.scheduler.places import Dispatcher
from aegaeon.scheduler.policies import POLICIES
from aegaeon.sim.cluster import Extras, Failure, simulate
from aegaeon.sim.fleets import make_fleet
from aegaeon.types import Request
from tests.support.simulated import COSTS, make_case, with_accounts

every_policy = pytest.mark.parametrize("name", list(POLICIES))


def run(name="slack", devices=4, case=None, extras=None, prefill=None):
    load, models = make_case() if case is None else case
    policy = POLICIES[name] if isinstance(name, str) else name
    fleet = make_fleet(policy.name, devices, Target(), prefill)
    return load, simulate(load, models, COSTS, policy, fleet, extras or Extras())


def key(one):
    return one.arrival_s, one.model, one.wanted_tokens


def times(simulated):
    return {key(one): list(one.token_times_s) for one in simulated.served}


@every_policy
@pytest.mark.parametrize("seed", [1, 2])
def test_every_request_ends_with_as_many_tokens_as_it_wants(name, seed):
    load, result = run(name, case=make_case(models=12, rate=0.2, seed=seed))
    assert sorted((one.model, one.wanted_tokens) for one in result.served) == sorted(
        (one.model, one.output_tokens) for one in load
    )
    for one in result.served:
        if name != "request":  # which drops those that waited long
            assert not one.is_failed
        if not one.is_failed:
            assert len(one.token_times_s) == one.wanted_tokens
        at_s = [one.arrival_s, *one.token_times_s]
        assert at_s == sorted(at_s)
        assert at_s[-1] <= result.ended_s


@pytest.mark.parametrize(
    ("models", "rate", "devices", "prefill"),
    [(12, 0.2, 4, 0), (6, 0.5, 1, 0), (12, 0.5, 3, 1), (3, 1.0, 1, 0)],
)
@pytest.mark.parametrize("seed", [1, 2, 9, 14])
def test_kv_that_fills_devices_several_times_does_not_wedge_them(
    models, rate, devices, prefill, seed
):
    policy = with_accounts(POLICIES["slack"], lambda _: None)
    case = make_case(models, rate, seed=seed)
    load, result = run(policy, devices, case, prefill=prefill)
    assert len(result.served) == len(load) and all(one.is_complete for one in result.served)


@every_policy
def test_the_same_run_twice_is_the_same_to_the_last_bit(name):
    first, second = (run(name, case=make_case(rate=0.3))[1] for _ in range(2))
    assert times(first) == times(second)
    assert first.usage == second.usage


@every_policy
@pytest.mark.parametrize("prefill", [0, 2])
def test_weights_and_kv_never_need_more_than_the_device_has(name, prefill):
    accounts = []
    policy = with_accounts(POLICIES[name], accounts.append)
    case = make_case(models=12, rate=0.3, horizon_s=60.0)
    load, result = run(policy, case=case, prefill=prefill)
    assert len(accounts) == 4 and len(result.served) == len(load)
    if name != "request":
        assert not any(one.is_failed for one in result.served)
    if name == "slack":
        budget = COSTS.device_memory_gb * 0.9e9
        assert max(account.most for account in accounts) > 0.9 * budget
        assert sum(one.kv_moved_gb for one in result.usage) > 1  # there was pressure


@every_policy
def test_devices_that_fail_lose_no_request_and_no_token(name):
    case = make_case(models=6, rate=0.3)
    at_s = 12.5
    devices = 5
    _, whole = run(name, devices=devices, case=case)
    failures = [Failure(at_s, 0), Failure(at_s, devices - 1)]
    load, broken = run(name, devices=devices, case=case, extras=Extras(failures=failures))
    assert len(broken.served) == len(load)
    if name != "request":
        assert all(one.is_complete for one in broken.served)
    before, after = times(whole), times(broken)
    made = 0
    for request, at in before.items():
        then = [t for t in at if t < at_s]
        assert after[request][: len(then)] == then
        made += 0 < len(then) < len(at)
    assert made > 1 and before != after


def test_a_device_is_let_alone_once_it_failed_whatever_the_policy_says():
    class Stubborn(Dispatcher):
        def dispatch(self, places, model):
            return 0

        def dispatch_prefilled(self, places, model):
            return 0

    policy = dataclasses.replace(POLICIES["slack"], dispatcher=Stubborn)
    _, result = run(policy, devices=3, extras=Extras(failures=[Failure(5.0, 0)]))
    assert all(one.is_complete for one in result.served)
    assert result.usage[0].compute_s < 5.5 and result.usage[1].compute_s > 0


@pytest.mark.parametrize(
    ("failures", "prefill", "words"),
    [
        ([(1.0, 4)], None, "are 0 to 3"),
        ([(-1.0, 0)], None, "after 0 s"),
        ([(1.0, n) for n in range(4)], None, "let one of each role live"),
        ([(1.0, 0)], 1, "let one of each role live"),
    ],
)
def test_failures_that_leave_nobody_are_refused(failures, prefill, words):
    extras = Extras(failures=[Failure(*one) for one in failures])
    with pytest.raises(ConfigError, match=words):
        run(extras=extras, prefill=prefill)


def test_a_failure_after_all_is_done_changes_nothing():
    whole = run()[1]
    broken = run(extras=Extras(failures=[Failure(1e4, 0)]))[1]
    assert times(whole) == times(broken) and whole.ended_s == broken.ended_s


def test_the_timeline_accounts_for_all_of_a_devices_time():
    _, result = run(extras=Extras(with_timeline=True))
    lanes = defaultdict(list)
    for span in result.spans:
        lanes[span.device, span.kind == "load"].append(span)
    for spans in lanes.values():
        assert all(one.end_s <= later.start_s for one, later in pairwise(spans))
    for device, usage in enumerate(result.usage):
        computing = [s for s in lanes[device, False] if s.kind != "switch"]
        assert math.fsum(s.end_s - s.start_s for s in computing) == pytest.approx(usage.compute_s)
    assert run()[1].spans == []


def test_progress_counts_the_requests():
    heard = []
    load, _ = run(extras=Extras(progress=heard.append))
    assert heard == list(range(1, len(load) + 1))


def test_a_request_that_moved_says_what_it_already_has():
    """As the server's does, so that a policy sees the same."""
    seen: list[Request] = []

    class Noting:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def submit(self, request, now):
            seen.append(request)
            self.inner.submit(request, now)

    slack = POLICIES["slack"]
    policy = dataclasses.replace(slack, scheduler=lambda *how: Noting(slack.scheduler(*how)))
    run(policy, case=make_case(rate=0.3), extras=Extras(failures=[Failure(12.5, 1)]))
    again = [request for request in seen if request.attempt]
    assert again and any(request.generated_token_ids for request in again)
    assert all(len(request.generated_token_ids) < request.max_tokens for request in again)
