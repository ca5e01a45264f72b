"""Days by samples: a draw of nodes and minutes says what all of them, simulated whole, would."""

import dataclasses
import math
import random

import msgspec
import pytest

from aegaeon.metrics import Target, attainment
from aegaeon.scheduler.placement import Rules
from aegaeon.scheduler.policies import POLICIES
from aegaeon.sim.day import CellResult, Day, estimate
from aegaeon.sim.losses import churn, draw_losses, run_loss
from aegaeon.sim.nodes import Setup, Timing, node_of, simulate_nodes
from aegaeon.sim.traces import Profile, popularity
from aegaeon.sim.workloads import fit_lengths, poisson_of
from tests.support.simulated import COSTS, LENGTHS

WINDOW_S = 240.0


def day_of(rate, models=16, nodes=2, devices=2, target=Target(3.0, 0.05)):  # noqa: B008  frozen
    profile = Profile(WINDOW_S, (0.8 * rate, 1.2 * rate), LENGTHS)
    shares = popularity(models, 1.0)
    return Day(
        profile,
        shares,
        COSTS.of(tuple(shares)),
        COSTS,
        target,
        [node_of(f"n{index}", COSTS, devices, 400.0, 10.0) for index in range(nodes)],
    )


def simulated_whole(day, policy, where):
    """The share kept of all requests of the day, of all nodes under one clock and router."""
    load = []
    for window, rate in enumerate(day.profile.requests_per_s):
        rates = {model: rate * share for model, share in day.shares.items()}
        for one in poisson_of(rates, WINDOW_S, LENGTHS, window):
            load.append(msgspec.structs.replace(one, at_s=one.at_s + window * WINDOW_S))
    load = fit_lengths(tuple(load), day.models)
    timing = Timing(epoch_s=math.inf)
    policy = POLICIES[policy]
    setup = Setup(policy, day.target, day.costs, day.models, day.nodes, Rules(), timing)
    run = simulate_nodes(load, setup, day.flows(day.profile.mean), (), where)
    assert len(run.served) == len(load)
    return attainment(run.served, day.target).request


@pytest.mark.parametrize(
    ("policy", "rate", "least", "most"),
    [("slack", 2.0, 0.9, 1.0), ("slack", 3.6, 0.4, 0.97), ("request", 1.2, 0.3, 0.97)],
)
def test_samples_say_what_a_whole_run_says(policy, rate, least, most):
    day = day_of(rate)
    placed = day.place(rate, {})
    whole = simulated_whole(day, policy, placed.where)
    assert least <= whole <= most  # the load is one that tells
    found = estimate([day.run(policy, cell) for cell in day.cells(16, [placed], 3)])
    assert found.error < 0.05
    assert abs(found.share - whole) < 0.03 + 2 * found.error


def test_a_model_on_several_nodes_is_shared_out():
    day = day_of(4.0, models=4)
    placed = day.place(4.0, {})
    both = {**placed.where, "model-00000": ("n0", "n1")}
    placed = msgspec.structs.replace(placed, where=both)
    whole = simulated_whole(day, "slack", placed.where)
    found = estimate([day.run("slack", cell) for cell in day.cells(8, [placed], 3)])
    assert abs(found.share - whole) < 0.03 + 2 * found.error
    for cell in day.cells(8, [placed], 3):
        rate = day.profile.requests_per_s[cell.window]
        assert cell.rates["model-00000"] == pytest.approx(rate * day.shares["model-00000"] / 2)


def test_cells_are_drawn_in_proportion_to_their_requests():
    day = dataclasses.replace(
        day_of(1.0, nodes=4), profile=Profile(WINDOW_S, (1.0, 0.0, 3.0), LENGTHS)
    )
    placed = day.place(1.0, {})
    cells = day.cells(4000, [placed], 1)
    by_window = [sum(cell.window == number for cell in cells) for number in range(3)]
    assert by_window == [1000, 0, 3000]
    for node in day.nodes:
        share = sum(day.shares[model] for model, where in placed.where.items() if node.id in where)
        drawn = sum(cell.node == node.id for cell in cells) / 4000
        assert drawn == pytest.approx(share, abs=0.03)
    assert day.cells(10, [placed], 1) == day.cells(10, [placed], 1) != day.cells(10, [placed], 2)


def test_a_days_parts_have_placements_of_their_own():
    day = day_of(2.0)
    one, other = day.place(2.0, {}), day.place(2.0, {}, frozenset({"n0"}))
    cells = day.cells(30, [one, other], 1)
    assert {cell.node for cell in cells if cell.window == 1} == {"n1"}
    assert {cell.node for cell in cells if cell.window == 0} == {"n0", "n1"}


def test_an_estimates_error_is_that_of_many_estimates():
    draw = random.Random(1)

    def cells():
        for _ in range(30):
            expected = draw.uniform(5.0, 50.0)
            requests = max(1, round(draw.gauss(expected, math.sqrt(expected))))
            share = min(1.0, max(0.0, draw.gauss(0.8, 0.1)))
            yield CellResult(0, expected, requests, round(requests * share), 0, 0.5, 0)

    found = [estimate(list(cells())) for _ in range(300)]
    mean = sum(one.share for one in found) / 300
    spread = math.sqrt(sum((one.share - mean) ** 2 for one in found) / 300)
    assert mean == pytest.approx(0.8, abs=0.02)
    assert sum(one.error for one in found) / 300 == pytest.approx(spread, rel=0.2)
    assert estimate([]).error == math.inf


def test_nodes_are_lost_as_often_as_their_mtbf_says():
    names = [f"n{index}" for index in range(100)]
    losses = draw_losses(names, 1e6, 1e5, 7)
    assert len(losses) == pytest.approx(1000, rel=0.1)
    assert losses == sorted(losses) and {loss.node for loss in losses} == set(names)


def test_what_a_lost_node_served_is_served_by_others_within_seconds():
    day = day_of(2.0, nodes=5)
    placed = day.place(2.0, {})
    came = churn(day, placed, draw_losses([n.id for n in day.nodes], 480.0, 600.0, 3), 100.0)
    assert came.losses and came.moves and came.moved_gb >= 8.0 * came.moves
    result = run_loss(day, "slack", came.cells[0], notice_s=4.0)
    assert result.requests > 10
    weights = [day.models[m].weight_gb for m in came.cells[0].rates]
    assert 4.0 < result.longest_s <= 4.0 + sum(weights) / 10.0
    slow = run_loss(day, "slack", came.cells[0], notice_s=30.0)
    assert slow.kept < result.kept
