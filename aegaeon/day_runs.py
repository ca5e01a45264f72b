"""Days simulated in several processes, and how few devices a day needs: what `aegaeon plan --trace`
does, without its words."""

import dataclasses
import math
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, TypeVar

import msgspec
from tqdm import tqdm

from aegaeon.day_report import Curve, CurvePoint, DayReport, Hour, LossReport, Tried
from aegaeon.errors import ConfigError
from aegaeon.metrics import Target
from aegaeon.scheduler.cost import Costs, ModelCost
from aegaeon.scheduler.levels import Node, NodeId
from aegaeon.scheduler.placement import Placed, Where
from aegaeon.sim.day import Cell, CellResult, Day, Estimate, estimate
from aegaeon.sim.losses import LossCell, LossResult, churn, draw_losses, run_loss
from aegaeon.sim.nodes import node_of
from aegaeon.sim.traces import Profile
from aegaeon.types import ModelId

Task = TypeVar("Task", Cell, LossCell)
Result = TypeVar("Result")

MOST_LOSSES = 12  # simulated token by token
PARTS = 6  # of a day, each placed by itself, in a search
ROUND = 8  # samples between two looks whether they suffice
SURE = 3.0  # standard errors
STEP = 1.5  # between two numbers of nodes, until one is too few and one enough
CLOSE = 0.05  # these need be no closer to each other
LONGEST_S = 3600.0  # that one batch of samples may take


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A day to plan for, and what nodes there are to be had."""

    profile: Profile
    shares: dict[ModelId, float]
    costs: Costs
    target: Target
    devices_per_node: int
    cache_gb: float
    wire_gb_per_s: float
    mtbf_s: float | None
    repair_s: float
    notice_s: float
    least: float
    max_devices: int
    samples: int
    seed: int

    def day(self, nodes: int, factor: float = 1.0) -> Day:
        """Return the day with `factor` times the requests, on so many nodes."""
        return Day(
            profile=self.profile.scaled(factor),
            shares=self.shares,
            models=self.costs.of(tuple(self.shares)),
            costs=self.costs,
            target=self.target,
            nodes=[self._node(number) for number in range(nodes)],
        )

    def _node(self, number: int) -> Node:
        name, devices = f"node-{number:05d}", self.devices_per_node
        return node_of(name, self.costs, devices, self.cache_gb, self.wire_gb_per_s)


class Pool:
    """Processes that simulate samples; with one job none is started."""

    def __init__(self, jobs: int | None = None) -> None:
        """`jobs`: None for one on each processor. Raises ConfigError."""
        self.jobs = len(os.sched_getaffinity(0)) if jobs is None else jobs
        if self.jobs < 1:
            raise ConfigError("--jobs is at least 1")
        spawn = multiprocessing.get_context("spawn")
        is_alone = self.jobs == 1
        self._pool = None if is_alone else ProcessPoolExecutor(self.jobs, mp_context=spawn)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def cells(
        self, day: Day, policy: str, cells: Sequence[Cell], bar: "tqdm[Any]"
    ) -> list[CellResult]:
        """Return what comes of `cells`, in their order; `bar` hears of those that are done."""
        return self._each(_Cells(policy), day, cells, bar)

    def losses(
        self, asked: Asked, day: Day, policy: str, cells: Sequence[LossCell], bar: "tqdm[Any]"
    ) -> list[LossResult]:
        """As `cells`, of losses."""
        return self._each(_Losses(policy, asked.notice_s), day, cells, bar)

    def _each(
        self,
        work: Callable[[Day, Sequence[Task]], list[Result]],
        day: Day,
        tasks: Sequence[Task],
        bar: "tqdm[Any]",
    ) -> list[Result]:
        if self._pool is None:
            found = []
            for task in tasks:
                found += work(day, (task,))
                bar.update()
            return found
        size = max(1, len(tasks) // (4 * self.jobs))
        batches = [tasks[at : at + size] for at in range(0, len(tasks), size)]
        try:
            futures = [self._pool.submit(work, _part(day, batch), batch) for batch in batches]
            sizes: dict[Future[list[Result]], int] = {}
            for future, batch in zip(futures, batches, strict=True):
                sizes[future] = len(batch)
            for future in as_completed(futures, timeout=LONGEST_S):
                bar.update(sizes[future])
            return [result for future in futures for result in future.result()]
        except BrokenProcessPool:
            raise ConfigError(
                "a process of the simulation was killed, maybe for want of memory; lower --jobs"
            ) from None
        except TimeoutError:
            raise ConfigError(
                f"samples took more than {LONGEST_S:g} s; give fewer, or more devices"
            ) from None


def _part(day: Day, tasks: Sequence[Cell] | Sequence[LossCell]) -> Day:
    """What `tasks` want of `day`: a small part of what there is."""
    models: dict[ModelId, ModelCost] = {}
    names: set[NodeId] = set()
    for task in tasks:
        models.update((model, day.models[model]) for model in task.rates)
        if isinstance(task, LossCell):
            names.update((task.lost, *task.takers))
    nodes = [node for node in day.nodes if node.id in names]
    return dataclasses.replace(day, models=models, shares={}, nodes=nodes)


@dataclasses.dataclass(frozen=True)
class _Cells:
    policy: str

    def __call__(self, day: Day, tasks: Sequence[Cell]) -> list[CellResult]:
        return [day.run(self.policy, task) for task in tasks]


@dataclasses.dataclass(frozen=True)
class _Losses:
    policy: str
    notice_s: float

    def __call__(self, day: Day, tasks: Sequence[LossCell]) -> list[LossResult]:
        return [run_loss(day, self.policy, task, self.notice_s) for task in tasks]


def simulate_day(asked: Asked, policy: str, devices: int, pool: Pool) -> DayReport:
    """Return what a day comes to on `devices`. Raises ConfigError."""
    nodes, rest = divmod(devices, asked.devices_per_node)
    if rest or not nodes:
        raise ConfigError(
            f"{devices} devices are no whole nodes of {asked.devices_per_node}; see "
            "--devices-per-node"
        )
    day = asked.day(nodes)
    hours = max(1, round(day.profile.window_s * len(day.profile.requests_per_s) / 3600))
    began_s = time.perf_counter()
    placements = place_all(day, hours, "placing")
    placed_s = time.perf_counter() - began_s
    cells = day.cells(asked.samples, placements, asked.seed)
    with tqdm(total=len(cells), desc=policy, unit="sample", disable=None) as bar:
        results = pool.cells(day, policy, cells, bar)
    found = with_left(estimate(results), day.shares, placements)
    return DayReport(
        policy=policy,
        devices=devices,
        nodes=nodes,
        models=len(day.shares),
        target=asked.target,
        hours=hours,
        requests=day.profile.requests,
        attainment_request=found.share,
        error=found.error,
        samples=len(results),
        simulated_requests=sum(one.requests for one in results),
        simulated_tokens=sum(one.tokens for one in results),
        device_time_share=math.fsum(one.device_time_share for one in results) / len(results),
        replicas=sum(len(where) for where in placements[-1].where.values()),
        left=len(placements[-1].left),
        moves=sum(len(placed.moves) for placed in placements[1:]),
        placements=len(placements),
        placement_s=placed_s,
        by_hour=_by_hour(day, results, hours),
        losses=_losses(asked, day, policy, placements[0], pool),
        wall_s=0.0,
    )


def place_all(day: Day, parts: int, words: str = "") -> list[Placed]:
    """Return placements for equal parts of the day, each for its busiest window, from that before
    on."""
    rates = day.profile.requests_per_s
    count = min(parts, len(rates))
    placements: list[Placed] = []
    where: Where = {}
    with tqdm(total=count, desc=words, unit="part", disable=None if words else True) as bar:
        for number in range(count):
            part = rates[number * len(rates) // count : (number + 1) * len(rates) // count]
            placements.append(day.place(max(part), where))
            where = placements[-1].where
            bar.update()
    return placements


def with_left(
    found: Estimate, shares: Mapping[ModelId, float], placements: Sequence[Placed]
) -> Estimate:
    """Return `found`, of requests of models that live somewhere, as of all: the others fail."""
    left = math.fsum(shares[model] for placed in placements for model in placed.left)
    served = 1.0 - left / len(placements)
    return Estimate(served * found.share, served * found.error, found.cells)


def _by_hour(day: Day, results: Sequence[CellResult], hours: int) -> tuple[Hour, ...]:
    windows = len(day.profile.requests_per_s)
    found = []
    for hour in range(hours):
        first, end = hour * windows // hours, (hour + 1) * windows // hours
        rates = day.profile.requests_per_s[first:end]
        here = [one for one in results if first <= one.window < end]
        share = estimate(here).share if here else None
        found.append(Hour(hour, math.fsum(rates) / len(rates), share, len(here)))
    return tuple(found)


def _losses(asked: Asked, day: Day, policy: str, placed: Placed, pool: Pool) -> LossReport | None:
    if asked.mtbf_s is None:
        return None
    lasts_s = day.profile.window_s * len(day.profile.requests_per_s)
    names = [node.id for node in day.nodes]
    came = churn(day, placed, draw_losses(names, lasts_s, asked.mtbf_s, asked.seed), asked.repair_s)
    cells = random.Random(asked.seed).sample(came.cells, min(MOST_LOSSES, len(came.cells)))
    with tqdm(total=len(cells), desc="losses", unit="loss", disable=None) as bar:
        results = pool.losses(asked, day, policy, cells, bar)
    requests = sum(one.requests for one in results)
    return LossReport(
        losses=came.losses,
        moves=came.moves,
        moved_gb=came.moved_gb,
        samples=len(results),
        requests=requests,
        resumed=sum(one.resumed for one in results),
        attainment_request=sum(one.kept for one in results) / requests if requests else None,
        longest_s=max((one.longest_s for one in results), default=None),
    )


# How many are needed


def find_curve(asked: Asked, policies: Sequence[str], loads: Sequence[float], pool: Pool) -> Curve:
    """Return the devices that each of `policies` needs for each of `loads`, multiples of the
    day's."""
    points = []
    floors: dict[float, int] = {}  # of loads, whoever decides
    for policy in policies:
        guess = 0.0
        for factor in sorted(loads):
            with tqdm(desc=f"{policy} at x{factor:g}", unit="sample", disable=None) as bar:
                search = Search(asked, policy, factor, pool, bar, floors)
                point = search.run(guess * factor)
            points.append(point)
            if point.devices is not None:
                guess = point.devices / factor
    return Curve(
        models=len(asked.shares),
        target=asked.target,
        least_attainment=asked.least,
        points=tuple(points),
        wall_s=0.0,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Search:
    """Looks for the least number of nodes that keeps enough of a load."""

    asked: Asked
    policy: str
    factor: float
    pool: Pool
    bar: "tqdm[Any]"
    floors: dict[float, int]

    def run(self, guess: float) -> CurvePoint:
        """Begin with `guess` devices, or, below 1, with what the load takes at least."""
        asked = self.asked
        most = max(1, asked.max_devices // asked.devices_per_node)
        if guess < 1:
            guess = self._busy() / 0.85
        if self.factor not in self.floors:
            self.floors[self.factor] = self._floor(most)
        floor = self.floors[self.factor]
        nodes = min(most, max(floor, math.ceil(guess / asked.devices_per_node)))
        tried: dict[int, Estimate] = {}
        too_few, enough = floor - 1, most + 1
        while floor <= most:
            tried[nodes] = self._kept(nodes)
            if tried[nodes].share >= asked.least:
                enough = nodes
            else:
                too_few = nodes
            if enough > most and too_few < most:
                nodes = min(most, math.ceil(STEP * nodes))
            elif enough - too_few <= max(1, CLOSE * enough) or too_few == most:
                break
            elif too_few < floor:
                nodes = max(floor, int(enough / STEP))
            else:
                nodes = (too_few + enough) // 2
        if floor > most:  # some models live nowhere, whatever becomes of the others
            tried[most] = self._kept(most)
        best = tried[min(enough, most)]
        each = asked.devices_per_node
        return CurvePoint(
            policy=self.policy,
            load=self.factor,
            requests_per_s=self.factor * asked.profile.mean,
            devices=None if enough > most else enough * each,
            attainment_request=best.share,
            error=best.error,
            tried=tuple(Tried(n * each, tried[n].share, tried[n].error) for n in sorted(tried)),
        )

    def _busy(self) -> float:
        """Devices that the busiest window takes at least."""
        day = self.asked.day(1, self.factor)
        return day.busy(max(day.profile.requests_per_s))

    def _floor(self, most: int) -> int:
        """The least number of nodes, up to one more than `most`, on which every model has room:
        nobody plans with models that live nowhere, however rare they are."""
        asked = self.asked
        kinds = asked.costs.of(tuple(asked.shares)).values()
        # Fewer than hold all weights are not even tried: to place what never fits takes long.
        enough = math.ceil(math.fsum(one.weight_gb for one in kinds) / asked.cache_gb - 1e-6)
        too_few, step = enough - 1, max(1, enough // 20)
        while enough > most or self._lacks_room(enough):
            if enough >= most:
                return most + 1
            too_few, enough, step = enough, min(enough + step, most), 2 * step
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            if self._lacks_room(middle):
                too_few = middle
            else:
                enough = middle
        return enough

    def _lacks_room(self, nodes: int) -> bool:
        day = self.asked.day(nodes, self.factor)
        return bool(day.place(max(day.profile.requests_per_s), {}).left)

    def _kept(self, nodes: int) -> Estimate:
        """Sample until it is plain whether so many nodes are enough."""
        asked = self.asked
        day = asked.day(nodes, self.factor)
        placements = place_all(day, PARTS)
        cells = day.cells(asked.samples, placements, asked.seed)
        random.Random(asked.seed).shuffle(cells)  # the first ones stand for the whole day, too
        results: list[CellResult] = []
        found = Estimate(0.0, 0.0, 0)
        for at in range(0, len(cells), ROUND):
            self.bar.set_postfix(devices=nodes * asked.devices_per_node)
            results += self.pool.cells(day, self.policy, cells[at : at + ROUND], self.bar)
            found = with_left(estimate(results), day.shares, placements)
            if abs(found.share - asked.least) > SURE * found.error:
                break
        return found
