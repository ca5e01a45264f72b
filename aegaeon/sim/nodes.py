"""Nodes under one placement, one router and one clock: requests go to a node of their model, models
come over wires, nodes are lost. Within a node all is as on one machine.
"""

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec

from aegaeon.errors import ConfigError
from aegaeon.metrics import Served, Target
from aegaeon.scheduler.cost import Costs, ModelCost
from aegaeon.scheduler.demand import Flow, busy, loads_per_s
from aegaeon.scheduler.levels import Node, NodeId
from aegaeon.scheduler.placement import Move, Need, Placed, Rules, Where, place
from aegaeon.scheduler.policies import USABLE_MEMORY, Policy
from aegaeon.scheduler.routing import Router
from aegaeon.sim.cluster import Cluster, make_job, no_garbage
from aegaeon.sim.device import Device, Job, Usage
from aegaeon.sim.fleets import make_fleet
from aegaeon.sim.pace import exact
from aegaeon.sim.timeline import Timeline
from aegaeon.sim.workloads import Load
from aegaeon.types import ModelId

Flows = Mapping[ModelId, Flow]


class NodeLoss(msgspec.Struct, frozen=True, order=True):
    """A node is gone from `at_s` on; what it computed by then is with clients."""

    at_s: float
    node: NodeId


class Timing(msgspec.Struct, frozen=True):
    """Models are placed anew every `epoch_s`, and when a node is missed, `notice_s` after it was
    lost: its lease. What came lately counts by `recent`, the rest is what was known before."""

    epoch_s: float = 60.0
    notice_s: float = 5.0
    recent: float = 0.5


@dataclass(frozen=True, slots=True)
class Setup:
    """What a run consists of. All nodes have devices of the kind of `costs`, but links and memory
    of their own."""

    policy: Policy
    target: Target
    costs: Costs
    models: Mapping[ModelId, ModelCost]
    nodes: Sequence[Node]
    rules: Rules = field(default_factory=Rules)
    timing: Timing = field(default_factory=Timing)


class Fetch(msgspec.Struct, frozen=True):
    """A model came to a node, by `move`, in the time from `asked_s` to `came_s`."""

    move: Move
    asked_s: float
    came_s: float


@dataclass(slots=True)
class NodesRun:
    """What came of a load: every request, what each device of each node did, which models moved."""

    served: list[Served]
    usage: dict[NodeId, list[Usage]]
    fetches: list[Fetch] = field(default_factory=list)
    rounds: int = 0  # of placement
    resumed: int = 0  # requests that went on elsewhere


def node_of(
    name: NodeId, costs: Costs, devices: int, cache_gb: float, wire_gb_per_s: float
) -> Node:
    """Return a node of `devices` of the kind of `costs`."""
    return Node(
        id=name,
        devices=devices,
        cache_bytes=round(cache_gb * 1e9),
        device_bytes=round(costs.device_memory_gb * USABLE_MEMORY * 1e9),
        link_bytes_per_s=costs.link_gb_per_s * 1e9,
        wire_bytes_per_s=wire_gb_per_s * 1e9,
    )


def need_of(model: ModelId, cost: ModelCost, flow: Flow, target: Target) -> Need:
    """Return what a model needs that requests flow to."""
    return Need(
        model=model,
        weight_bytes=round(cost.weight_gb * 1e9),
        busy=busy(flow, cost, target),
        loads_per_s=loads_per_s(flow, target),
    )


class Site:
    """A node as the router sees it, at the moment that `now` says."""

    def __init__(self, node: Node, setup: Setup, now: Callable[[], float]) -> None:
        self.node = node
        self.is_lost = False
        self.limbo: list[Job] = []  # of a lost one that nobody has missed yet
        self._now = now
        fleet = make_fleet(setup.policy.name, node.devices, setup.target)
        gb = node.device_bytes / USABLE_MEMORY / 1e9
        link = node.link_bytes_per_s / 1e9
        costs = msgspec.structs.replace(setup.costs, link_gb_per_s=link, device_memory_gb=gb)
        self.cluster = Cluster(setup.policy, fleet, costs, setup.models, Timeline())

    @property
    def load(self) -> float:
        """That of its least busy device."""
        return min(device.scheduler.load for device in self._devices())

    def wait_s(self, model: ModelId) -> float:
        """Prefills ahead, and the weights where they have to come, on the best device."""
        load_s = self.cluster.prices.load_s(model)
        return min(
            self._ahead_s(device) + (0.0 if device.scheduler.is_resident(model) else load_s)
            for device in self._devices()
        )

    def is_resident(self, model: ModelId) -> bool:
        """Whether a device has the weights."""
        return any(device.scheduler.is_resident(model) for device in self._devices())

    def runs(self, model: ModelId) -> bool:
        """Whether requests of `model` are there."""
        jobs = (job for device in self.cluster.devices for job in device.jobs.values())
        return any(job.request.model == model for job in jobs)

    def _devices(self) -> Sequence[Device]:
        if not self.is_lost:
            self.cluster.advance(self._now())
        return self.cluster.prefilling

    def _ahead_s(self, device: Device) -> float:
        """What is not prefilled yet: whoever runs has all of its tokens behind it."""
        waits_s = 0.0
        for job in device.jobs.values():
            span = job.context_tokens, len(job.request.prompt_token_ids) + job.made
            if span[0] < span[1]:
                waits_s += self.cluster.prices.prefill_s(job.request.model, [span])
        return waits_s


class Wires:
    """Each node takes one model after the other, and gives one after the other."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._speed = {node.id: node.wire_bytes_per_s for node in nodes}
        self._in_s: dict[NodeId, float] = defaultdict(float)
        self._out_s: dict[NodeId, float] = defaultdict(float)

    def fetch(self, move: Move, weight_bytes: int, now: float) -> float:
        """Return when the weights will have come, at the speed of the slower end."""
        speed = self._speed[move.to]
        begins_s = max(now, self._in_s[move.to])
        if move.source is not None:
            speed = min(speed, self._speed[move.source])
            begins_s = max(begins_s, self._out_s[move.source])
            self._out_s[move.source] = begins_s + weight_bytes / speed
        self._in_s[move.to] = begins_s + weight_bytes / speed
        return exact(self._in_s[move.to])


class Nodes:
    """A run of nodes. What happens: epochs, losses, that they are missed, weights that come."""

    def __init__(self, setup: Setup, flows: Flows, where: Where | None = None) -> None:
        """`flows` are what is known of each model before it begins, `where` is where models live
        then; None: where they are placed best."""
        self._setup = setup
        self._flows = dict(flows)
        self._now = 0.0
        self._alive = {node.id: node for node in setup.nodes}
        self._sites = {node.id: Site(node, setup, lambda: self._now) for node in setup.nodes}
        self._all = dict(self._sites)
        self._wires = Wires(setup.nodes)
        self._router = Router()
        self._where: dict[ModelId, tuple[NodeId, ...]] = {}
        self._ready: dict[ModelId, list[NodeId]] = {}
        # Those that leave, until the weights have come to where they go.
        self._staying: set[tuple[ModelId, NodeId | None]] = set()
        self._held: dict[ModelId, list[Job]] = defaultdict(list)  # for want of a node
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0
        self._counts: dict[ModelId, list[int]] = defaultdict(lambda: [0, 0, 0])
        self._counted_s = 0.0
        self.result = NodesRun([], {})
        self._begin(self._choose().where if where is None else where)

    def run(self, load: Load, losses: Sequence[NodeLoss]) -> NodesRun:
        """Serve `load`, ordered by time, to its end."""
        self._expect(load, losses)
        for number, arrival in enumerate(load):
            at_s = exact(arrival.at_s)
            self._until(at_s)
            self._now = at_s
            job = make_job(number, arrival, at_s)
            counts = self._counts[arrival.model]
            for index, count in enumerate((1, arrival.prompt_tokens, arrival.output_tokens)):
                counts[index] += count
            self._send(job)
        self._until(math.inf)
        for site in self._all.values():
            if not site.is_lost:
                site.cluster.advance(math.inf)
            self.result.served += site.cluster.served
            self.result.usage[site.node.id] = site.cluster.usage
        for jobs in self._held.values():
            self.result.served += [_unserved(job) for job in jobs]
        return self.result

    def _expect(self, load: Load, losses: Sequence[NodeLoss]) -> None:
        epoch_s = self._setup.timing.epoch_s
        ends_s = load[-1].at_s if load else 0.0
        for number in range(1, math.floor(ends_s / epoch_s) + 1):
            self._at(exact(number * epoch_s), self._epoch)
        for loss in losses:
            if loss.node not in self._all or loss.at_s < 0:
                raise ConfigError(f"nodes are lost after 0 s, and there is no node {loss.node!r}")
            self._at(exact(loss.at_s), partial(self._lose, loss.node))

    def _at(self, at_s: float, what: Callable[[], None]) -> None:
        self._serial += 1
        heapq.heappush(self._events, (at_s, self._serial, what))

    def _until(self, until_s: float) -> None:
        while self._events and self._events[0][0] <= until_s:
            self._now, _, what = heapq.heappop(self._events)
            what()

    # Requests

    def _send(self, job: Job) -> None:
        node = self._router.route(job.request.model, self._sites)
        if node is None:
            self._held[job.request.model].append(job)
        elif self._sites[node].is_lost:
            self._sites[node].limbo.append(job)
        else:
            self._sites[node].cluster.submit(job, self._now)

    # Nodes

    def _lose(self, node: NodeId) -> None:
        site = self._all[node]
        if not site.is_lost:
            site.limbo = site.cluster.lose(self._now)
            self.result.resumed += len(site.limbo)
            site.is_lost = True
            self._at(exact(self._now + self._setup.timing.notice_s), partial(self._miss, site))

    def _miss(self, site: Site) -> None:
        del self._sites[site.node.id], self._alive[site.node.id]
        self._place()
        for job in site.limbo:
            self._send(job)
        site.limbo = []

    # Models

    def _begin(self, where: Where) -> None:
        """The first placement finds the weights there."""
        self._where = dict(where)
        self._ready = {model: list(where.get(model, ())) for model in self._flows}
        self._router.settle(where)

    def _epoch(self) -> None:
        recent, took_s = self._setup.timing.recent, self._now - self._counted_s
        for model, flow in self._flows.items():
            count, prompt, output = self._counts.get(model, (0, 0, 0))
            rate = recent * count / took_s + (1 - recent) * flow.requests_per_s
            part = recent * count / took_s / rate if count else 0.0
            self._flows[model] = Flow(
                rate,
                flow.prompt_tokens + part * (prompt / max(count, 1) - flow.prompt_tokens),
                flow.output_tokens + part * (output / max(count, 1) - flow.output_tokens),
            )
        self._counts.clear()
        self._counted_s = self._now
        self._place()

    def _choose(self) -> Placed:
        setup = self._setup
        self.result.rounds += 1
        needs = [
            need_of(model, setup.models[model], flow, setup.target)
            for model, flow in self._flows.items()
        ]
        alive = [self._without_leaving(node) for node in self._alive.values()]
        return place(alive, needs, self._where, setup.rules)

    def _without_leaving(self, node: Node) -> Node:
        """`node` without the room of what it gave up, but still has requests of."""
        here = [m for m in self._flows if node.id not in self._where.get(m, ())]
        site = self._all[node.id]
        models = [m for m in here if (m, node.id) in self._staying or site.runs(m)]
        taken = sum(round(self._setup.models[model].weight_gb * 1e9) for model in models)
        return msgspec.structs.replace(node, cache_bytes=max(0, node.cache_bytes - taken))

    def _place(self) -> None:
        placed = self._choose()
        self._where = placed.where
        self._staying |= {(move.model, move.leaves) for move in placed.moves}
        for model, nodes in placed.where.items():
            self._ready[model] = [
                node
                for node in self._ready[model]
                if node in self._alive and (node in nodes or (model, node) in self._staying)
            ]
        for move in placed.moves:
            self._fetch(move)
        self._router.settle({model: tuple(nodes) for model, nodes in self._ready.items()})

    def _fetch(self, move: Move) -> None:
        weight_bytes = round(self._setup.models[move.model].weight_gb * 1e9)
        came_s = self._wires.fetch(move, weight_bytes, self._now)
        self.result.fetches.append(Fetch(move, self._now, came_s))
        self._at(came_s, partial(self._came, move))

    def _came(self, move: Move) -> None:
        ready = self._ready[move.model]
        self._staying.discard((move.model, move.leaves))
        if move.leaves in ready and move.leaves not in self._where[move.model]:
            ready.remove(move.leaves)
        if move.to in self._alive and move.to in self._where[move.model] and move.to not in ready:
            ready.append(move.to)
        self._router.settle({move.model: tuple(ready)})
        if ready:
            for job in self._held.pop(move.model, ()):
                self._send(job)


def _unserved(job: Job) -> Served:
    request = job.request
    return Served(request.model, request.arrival_s, job.times_s, request.max_tokens, is_failed=True)


def simulate_nodes(
    load: Load,
    setup: Setup,
    flows: Flows,
    losses: Sequence[NodeLoss] = (),
    where: Where | None = None,
) -> NodesRun:
    """Return what becomes of `load` on the nodes of `setup`, of whose models `flows` are known
    before; they live at first where `where` says, or are placed. Raises ConfigError."""
    with no_garbage():
        return Nodes(setup, flows, where).run(load, losses)
