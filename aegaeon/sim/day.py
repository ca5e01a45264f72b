"""A day of thousands of devices, by samples: models are placed on all nodes for each hour, but only
some nodes are simulated, each for a while, token by token.

Between two placements a node depends on others only by how the requests of models that live on
several are shared out, which a draw does here. So a node and a window of time, drawn in proportion
to its requests, stand for all; what that leaves open is a standard error, and is said.
"""

import bisect
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec

from aegaeon.metrics import Target, keeps
from aegaeon.scheduler.cost import Costs, ModelCost
from aegaeon.scheduler.demand import Flow
from aegaeon.scheduler.levels import Node, NodeId
from aegaeon.scheduler.placement import Need, Placed, Rules, Where, place
from aegaeon.sim.cluster import simulate
from aegaeon.sim.fleets import make_fleet, policy_of
from aegaeon.sim.nodes import need_of
from aegaeon.sim.traces import Profile
from aegaeon.sim.workloads import fit_lengths, poisson_of
from aegaeon.types import ModelId

# A node is simulated from so long before what counts, for its state not to be that of a start, to
# so long after it, for the last ones not to be alone. Where requests pile up for longer than that,
# a sample sees too little of it: a node that kept 81 % of a load for ten minutes kept 85 % in
# samples with 45 s before, 83 % with 90 s, 80 % with 180 s; one that has no more than it can do
# differs by less than the error.
BEFORE_S, COUNTED_S, AFTER_S = 90.0, 60.0, 15.0


class Cell(msgspec.Struct, frozen=True):
    """A node in a window: which requests come to it, in each second, and from which draw."""

    window: int
    node: NodeId
    devices: int
    link_gb_per_s: float
    rates: dict[ModelId, float]
    seed: int

    @property
    def expected(self) -> float:
        """Requests that count, in the mean."""
        return COUNTED_S * math.fsum(self.rates.values())


class CellResult(msgspec.Struct, frozen=True):
    """Of a cell's requests that count, how many kept the promise; and its devices' time."""

    window: int
    expected: float
    requests: int
    kept: int
    tokens: int
    device_time_share: float
    loads: int


class Estimate(msgspec.Struct, frozen=True):
    """Of all requests, what share keeps the promise; `error` is the standard error of that."""

    share: float
    error: float
    cells: int


@dataclass(frozen=True)
class Day:
    """What is asked of which nodes. `shares` are the models' parts of all requests; `lengths` come
    as those of the profile."""

    profile: Profile
    shares: Mapping[ModelId, float]
    models: Mapping[ModelId, ModelCost]
    costs: Costs
    target: Target
    nodes: Sequence[Node]

    @cached_property
    def means(self) -> dict[ModelCost, tuple[float, float]]:
        """The mean lengths of prompts and outputs that each kind of model can take."""
        found = {}
        for cost in set(self.models.values()):
            load = self.profile.as_load("m", cost.max_len)
            count = len(load)
            found[cost] = (
                sum(one.prompt_tokens for one in load) / count,
                sum(one.output_tokens for one in load) / count,
            )
        return found

    def flows(self, requests_per_s: float) -> dict[ModelId, Flow]:
        """Return what flows to each model when so many requests come in all."""
        return {
            model: Flow(requests_per_s * share, *self.means[self.models[model]])
            for model, share in self.shares.items()
        }

    def place(
        self, requests_per_s: float, present: Where, gone: frozenset[NodeId] = frozenset()
    ) -> Placed:
        """Return where models live when so many requests come, on all nodes but those `gone`."""
        needs = self._needs(requests_per_s)
        nodes = [node for node in self.nodes if node.id not in gone]
        return place(nodes, needs, present, Rules())

    def busy(self, requests_per_s: float) -> float:
        """Return the seconds of devices that so many requests take in a second."""
        return math.fsum(need.busy for need in self._needs(requests_per_s))

    def _needs(self, requests_per_s: float) -> list[Need]:
        return [
            need_of(model, self.models[model], flow, self.target)
            for model, flow in self.flows(requests_per_s).items()
        ]

    def cells(self, count: int, placements: Sequence[Placed], seed: int) -> list[Cell]:
        """Return a draw of `count` cells, evenly over the day's requests; `placements` of equal
        parts of the day, in order."""
        draw = random.Random(seed)
        rates = self.profile.requests_per_s
        ends = list(itertools.accumulate(rates))
        start = draw.random()
        held = [_Held(placed.where, self.shares) for placed in placements]
        cells = []
        for number in range(count):
            at = (number + start) / count * ends[-1]
            window = min(bisect.bisect_right(ends, at), len(rates) - 1)
            part = held[window * len(placements) // len(rates)]
            node = part.draw(draw)
            cells.append(self._cell(window, node, part.of(node), draw.getrandbits(32)))
        return cells

    def _cell(self, window: int, node: NodeId, shares: Mapping[ModelId, float], seed: int) -> Cell:
        here = self._by_id[node]
        rate = self.profile.requests_per_s[window]
        rates = {model: rate * share for model, share in shares.items()}
        return Cell(window, node, here.devices, here.link_bytes_per_s / 1e9, rates, seed)

    @cached_property
    def _by_id(self) -> dict[NodeId, Node]:
        return {node.id: node for node in self.nodes}

    def run(self, policy: str, cell: Cell) -> CellResult:
        """Simulate `cell` under `policy`, token by token."""
        models = {model: self.models[model] for model in cell.rates}
        lasts_s = BEFORE_S + COUNTED_S + AFTER_S
        drawn = poisson_of(cell.rates, lasts_s, self.profile.lengths, cell.seed)
        load = fit_lengths(drawn, models)
        costs = msgspec.structs.replace(self.costs, link_gb_per_s=cell.link_gb_per_s)
        fleet = make_fleet(policy, cell.devices, self.target)
        run = simulate(load, models, costs, policy_of(policy), fleet)
        counted = [one for one in run.served if BEFORE_S <= one.arrival_s < BEFORE_S + COUNTED_S]
        compute_s = math.fsum(usage.compute_s for usage in run.usage)
        return CellResult(
            window=cell.window,
            expected=cell.expected,
            requests=len(counted),
            kept=sum(keeps(one, self.target) for one in counted),
            tokens=sum(len(one.token_times_s) for one in run.served),
            device_time_share=compute_s / (cell.devices * max(run.ended_s, lasts_s)),
            loads=sum(usage.loads for usage in run.usage),
        )


class _Held:
    """What share of all requests comes to each node, by model."""

    def __init__(self, where: Where, shares: Mapping[ModelId, float]) -> None:
        self._models: dict[NodeId, dict[ModelId, float]] = {}
        for model, nodes in where.items():
            for node in nodes:
                self._models.setdefault(node, {})[model] = shares[model] / len(nodes)
        self._nodes = list(self._models)
        sums = (math.fsum(models.values()) for models in self._models.values())
        self._ends = list(itertools.accumulate(sums))

    def draw(self, draw: random.Random) -> NodeId:
        """Return a node, in proportion to its requests."""
        at = draw.random() * self._ends[-1]
        return self._nodes[min(bisect.bisect_right(self._ends, at), len(self._nodes) - 1)]

    def of(self, node: NodeId) -> dict[ModelId, float]:
        """Return the shares of the models of `node`."""
        return self._models[node]


def estimate(results: Sequence[CellResult]) -> Estimate:
    """Return what cells, drawn in proportion to their expected requests, say of all requests: a
    ratio of means over draws (Hansen and Hurwitz, Hajek), with its linearised error."""
    weighed = [(one.kept / one.expected, one.requests / one.expected) for one in results]
    whole = math.fsum(count for _, count in weighed)
    if not whole:
        return Estimate(1.0, math.inf, len(results))
    share = math.fsum(kept for kept, _ in weighed) / whole
    squares = math.fsum((kept - share * count) ** 2 for kept, count in weighed)
    cells = len(results)
    error = math.inf if cells < 2 else math.sqrt(squares * cells / (cells - 1)) / whole
    return Estimate(share, error, cells)
