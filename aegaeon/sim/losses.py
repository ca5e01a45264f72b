"""Nodes that are lost in a day, and what becomes of the requests of their models: a draw of losses
is simulated token by token, each with the nodes that take over."""

import math
import random
from collections.abc import Sequence

import msgspec

from aegaeon.metrics import keeps
from aegaeon.scheduler.demand import Flow
from aegaeon.scheduler.levels import NodeId
from aegaeon.scheduler.placement import Placed, Rules, Where
from aegaeon.sim.day import COUNTED_S, Day
from aegaeon.sim.fleets import policy_of
from aegaeon.sim.nodes import NodeLoss, Setup, Timing, simulate_nodes
from aegaeon.sim.workloads import fit_lengths, poisson_of
from aegaeon.types import ModelId

TOUCHED_BEFORE_S, TOUCHED_AFTER_S = 20.0, 40.0  # requests that come so near to a loss count
RUNS_S = 45.0  # before those
MOST_TAKERS = 6  # nodes simulated beside the lost one


class LossCell(msgspec.Struct, frozen=True):
    """A lost node and some that take over: `rates` of the models there, and where they live."""

    lost: NodeId
    takers: tuple[NodeId, ...]
    rates: dict[ModelId, float]
    where: dict[ModelId, tuple[NodeId, ...]]
    seed: int


class LossResult(msgspec.Struct, frozen=True):
    """Of the requests for models of a lost node, near to its loss, how many kept the promise; how
    many were under way there, and how long the slowest model took to come elsewhere."""

    requests: int
    kept: int
    resumed: int
    longest_s: float


class Churn(msgspec.Struct, frozen=True):
    """What losses made move: models, and bytes over wires."""

    losses: int
    moves: int
    moved_gb: float
    cells: tuple[LossCell, ...]


def draw_losses(
    nodes: Sequence[NodeId], lasts_s: float, mtbf_s: float, seed: int
) -> list[NodeLoss]:
    """Return losses independent of each other, each node's in the mean `mtbf_s` apart."""
    draw = random.Random(seed)
    losses: list[NodeLoss] = []
    at_s = 0.0
    while True:
        at_s += draw.expovariate(len(nodes) / mtbf_s)
        if at_s >= lasts_s:
            return losses
        losses.append(NodeLoss(at_s, draw.choice(nodes)))


def churn(day: Day, placed: Placed, losses: Sequence[NodeLoss], repair_s: float) -> Churn:
    """Place anew at each loss, and when a node comes back, empty, `repair_s` after it."""
    events = sorted(
        [(loss.at_s, 1, loss.node) for loss in losses]
        + [(loss.at_s + repair_s, 0, loss.node) for loss in losses]
    )
    lasts_s = day.profile.window_s * len(day.profile.requests_per_s)
    where: Where = placed.where
    gone: set[NodeId] = set()
    moves, moved_gb, lost = 0, 0.0, 0
    cells = []
    for at_s, is_loss, node in events:
        if at_s >= lasts_s or (node in gone) == bool(is_loss):
            continue  # lost while it was gone, or long back
        (gone.add if is_loss else gone.discard)(node)
        window = int(at_s / day.profile.window_s)
        rate = day.profile.requests_per_s[window]
        after = day.place(rate, where, frozenset(gone))
        moves += len(after.moves)
        moved_gb += math.fsum(day.models[move.model].weight_gb for move in after.moves)
        if is_loss:
            lost += 1
            cell = _cell(day, node, where, after, rate)
            if cell is not None:
                cells.append(cell)
        where = after.where
    return Churn(lost, moves, moved_gb, tuple(cells))


def _cell(day: Day, lost: NodeId, before: Where, after: Placed, rate: float) -> LossCell | None:
    """The lost node's models that go to the first few takers, and all that lives with these."""
    moved = [move for move in after.moves if move.why == "lost"]
    takers = tuple(dict.fromkeys(move.to for move in moved))[:MOST_TAKERS]
    ours = {move.model for move in moved if move.to in takers}
    nodes = {lost, *takers}
    where: dict[ModelId, tuple[NodeId, ...]] = {}
    rates: dict[ModelId, float] = {}
    for model, places in before.items():
        here = tuple(node for node in places if node in nodes)
        if not here or (here == (lost,) and model not in ours):
            continue
        where[model] = here
        rates[model] = rate * day.shares[model] * len(here) / len(places)
    if not ours or not math.fsum(rates[model] for model in ours):
        return None
    return LossCell(lost, takers, rates, where, len(rates))


def run_loss(day: Day, policy: str, cell: LossCell, notice_s: float) -> LossResult:
    """Simulate `cell`: the node is lost when it has run for a while."""
    models = {model: day.models[model] for model in cell.rates}
    lost_s = RUNS_S + TOUCHED_BEFORE_S
    drawn = poisson_of(cell.rates, lost_s + COUNTED_S, day.profile.lengths, cell.seed)
    load = fit_lengths(drawn, models)
    ids = {cell.lost, *cell.takers}
    setup = Setup(
        policy_of(policy),
        day.target,
        day.costs,
        models,
        [node for node in day.nodes if node.id in ids],
        Rules(),
        Timing(epoch_s=math.inf, notice_s=notice_s),
    )
    flows = {m: Flow(rate, *day.means[models[m]]) for m, rate in cell.rates.items()}
    run = simulate_nodes(load, setup, flows, [NodeLoss(lost_s, cell.lost)], cell.where)
    touched = [
        one
        for one in run.served
        if cell.lost in cell.where[one.model]
        and lost_s - TOUCHED_BEFORE_S <= one.arrival_s < lost_s + TOUCHED_AFTER_S
    ]
    return LossResult(
        requests=len(touched),
        kept=sum(keeps(one, day.target) for one in touched),
        resumed=run.resumed,
        longest_s=max((fetch.came_s - lost_s for fetch in run.fetches), default=0.0),
    )
