"""Devices under one dispatcher and one clock: a load in, what became of each request out."""

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from aegaeon.metrics import Served
from aegaeon.scheduler.cost import Costs, ModelCost
from aegaeon.scheduler.policies import Fleet, Policy
from aegaeon.sim.device import Device, Job, Prices, Usage
from aegaeon.sim.pace import exact
from aegaeon.sim.timeline import Span, Timeline
from aegaeon.sim.workloads import Arrival, Load
from aegaeon.types import ModelId, Request, SamplingParams

SAMPLING = SamplingParams(temperature=0.0)


@dataclass(slots=True)
class Simulated:
    """What came of a load: every request, and what the devices did."""

    served: list[Served]
    usage: list[Usage]
    ended_s: float
    spans: list[Span] = field(default_factory=list)


class Cluster:
    """A fleet in simulated time."""

    def __init__(
        self,
        policy: Policy,
        fleet: Fleet,
        costs: Costs,
        models: Mapping[ModelId, ModelCost],
        timeline: Timeline,
    ) -> None:
        self._policy = policy
        self._prices = Prices(costs, models)
        self._dispatcher = policy.dispatcher()
        self._served: list[Served] = []
        schedulers = policy.schedulers(fleet, costs, models)
        self._devices = [
            Device(index, scheduler, self._prices, timeline, self._on_end, self._on_handoff)
            for index, scheduler in enumerate(schedulers)
        ]
        self._prefilling = [d for d in self._devices if d.scheduler.role != "decode"]
        self._decoding = [d for d in self._devices if d.scheduler.role != "prefill"]
        self._prefill_places = [device.scheduler for device in self._prefilling]
        self._decode_places = [device.scheduler for device in self._decoding]
        # (time, serial number, device, version of its due time or None, job handed over)
        self._heap: list[tuple[float, int, Device, Job | None]] = []
        self._serial = 0
        self._now = 0.0

    def run(self, load: Load, progress: Callable[[int], None]) -> list[Served]:
        """Serve `load` to its end; `progress` hears how many requests have come."""
        for number, arrival in enumerate(load):
            at_s = exact(arrival.at_s)
            self._run_until(at_s)
            self._now = at_s
            place = self._dispatcher.dispatch(self._prefill_places, arrival.model)
            device = self._prefilling[place]
            device.tick(at_s, arrived=(_job(number, arrival, at_s),))
            self._push(device)
            progress(number + 1)
        self._run_until(math.inf)
        return self._served

    @property
    def usage(self) -> list[Usage]:
        """What each device did."""
        return [device.usage for device in self._devices]

    @property
    def now(self) -> float:
        """The time of the last event."""
        return self._now

    def _run_until(self, until_s: float) -> None:
        """Let everything happen that is due before `until_s`."""
        heap = self._heap
        while heap and heap[0][0] < until_s:
            at_s, _, device, job = heapq.heappop(heap)
            if job is not None:
                self._now = at_s
                self._adopt(job, at_s)
            elif at_s == device.due_s:
                self._now = at_s
                device.tick(at_s)
                self._push(device)

    def _push(self, device: Device) -> None:
        if device.due_s < math.inf:
            self._serial += 1
            heapq.heappush(self._heap, (device.due_s, self._serial, device, None))

    def _on_end(self, job: Job, is_failed: bool) -> None:
        request = job.request
        self._served.append(
            Served(request.model, request.arrival_s, job.times_s, request.max_tokens, is_failed)
        )

    def _on_handoff(self, index: int, job: Job, now: float) -> None:
        """The KV goes to the host of the device that prefilled; from there others fetch it."""
        cost = self._prices.models[job.request.model]
        at_s = now + self._prices.link_s(cost.kv_gb(job.context_tokens))
        self._serial += 1
        heapq.heappush(self._heap, (at_s, self._serial, self._devices[index], job))

    def _adopt(self, job: Job, now: float) -> None:
        place = self._dispatcher.dispatch_prefilled(self._decode_places, job.request.model)
        device = self._decoding[place]
        device.tick(now, adopted=(job,))
        self._push(device)


def simulate(
    load: Load,
    models: Mapping[ModelId, ModelCost],
    costs: Costs,
    policy: Policy,
    fleet: Fleet,
    *,
    with_timeline: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> Simulated:
    """Return what becomes of `load`, ordered by time, of `models` on `fleet` under `policy`."""
    timeline = Timeline(is_wanted=with_timeline)
    cluster = Cluster(policy, fleet, costs, models, timeline)
    served = cluster.run(load, progress)
    return Simulated(served, cluster.usage, cluster.now, timeline.spans())


def _job(number: int, arrival: Arrival, at_s: float) -> Job:
    return Job(
        Request(
            id=f"r{number}",
            model=arrival.model,
            prompt_token_ids=(0,) * arrival.prompt_tokens,
            sampling=SAMPLING,
            max_tokens=arrival.output_tokens,
            stop_token_ids=(),
            reply_to="",
            arrival_s=at_s,
            deadline_s=math.inf,
        )
    )
