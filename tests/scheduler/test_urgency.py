"""Deadlines and slack."""

import msgspec
import pytest

from aegaeon.metrics import Target
from aegaeon.scheduler.cost import ModelCost
from aegaeon.scheduler.fairness import Shares
from aegaeon.scheduler.groups import Entry
from aegaeon.scheduler.ranks import Ranks
from aegaeon.scheduler.urgency import SlackGroup, SlackSettings, Urgency, scaled

COST = ModelCost(
    weight_gb=1, kv_gb_per_token=1e-4, max_len=4096, prefill=(1e-3, 0.0, 0.5),
    decode=(0.0, 0.0, 0.02),
)  # fmt: skip
SETTINGS = SlackSettings()
URGENCY = Urgency(SETTINGS, Shares(), Ranks({}))


def make_group(waiting=(), running=()):
    group = SlackGroup("m", cost=COST, target=Target(10.0, 0.1))
    for number, (arrival_s, tokens) in enumerate(waiting):
        group.waiting[f"w{number}"] = Entry(f"w{number}", arrival_s, tokens)
    for number, (first_s, made) in enumerate(running):
        name = f"r{number}"
        group.running[name] = Entry(name, 0.0, 100, made=made, first_s=first_s)
    return group


def test_a_waiting_request_is_due_by_its_ttft_less_its_prefill():
    assert URGENCY.slack_s(make_group(waiting=[(2.0, 500)]), 4.0) == pytest.approx(7.0)


def test_what_is_known_of_a_prompt_need_not_be_run():
    group = make_group(waiting=[(2.0, 500)])
    group.waiting["w0"].known = 480
    assert URGENCY.slack_s(group, 4.0) == pytest.approx(7.48)
    cost = msgspec.structs.replace(COST, prefill=(0.0, 1e-6, 0.5))
    assert group.waiting["w0"].prefill_s(cost) == pytest.approx(0.5 + 1e-6 * (500**2 - 480**2))
    assert group.waiting["w0"].prefill_s(cost, 0) == pytest.approx(0.5 + 1e-6 * 500**2)
    assert group.to_prefill == 20


def test_a_running_request_is_due_a_tbt_after_another_from_its_first_token():
    group = make_group(running=[(5.0, 1), (2.0, 41)])
    assert URGENCY.slack_s(group, 5.0) == pytest.approx(0.1)
    assert URGENCY.urgent(group, 5.0).id == "r0"
    assert URGENCY.lead_s(make_group(running=[(5.0, 50)]), 5.0) == pytest.approx(5.0)


def test_the_most_urgent_of_all_counts():
    group = make_group(waiting=[(1.0, 500), (0.0, 500)], running=[(1.0, 99)])
    assert URGENCY.slack_s(group, 1.0) == pytest.approx(8.0)


def test_the_hopeless_yield_for_a_bounded_time_to_those_with_hope():
    group = make_group(waiting=[(0.0, 500), (5.0, 500)])
    assert URGENCY.slack_s(group, 9.5) == pytest.approx(4.5)  # the first one cannot make it
    assert URGENCY.slack_s(make_group(waiting=[(0.0, 500)]), 9.5) == pytest.approx(59.5)
    running = make_group(running=[(0.0, 1)])
    assert URGENCY.slack_s(running, 3.0) == pytest.approx(-2.9)
    assert URGENCY.slack_s(running, 3.2) == pytest.approx(56.9)
    assert URGENCY.slack_s(running, 60.1) == pytest.approx(0.0)


def test_a_shed_model_yields_until_its_time_is_over():
    group = make_group(waiting=[(0.0, 500)])
    group.shed_until_s = 30.0
    assert URGENCY.slack_s(group, 1.0) == pytest.approx(29.0)


def test_settings_follow_the_ttft_target():
    assert scaled(SETTINGS, 10.0) == SETTINGS
    assert scaled(SETTINGS, 5.0).ahead_s == SETTINGS.ahead_s / 2
