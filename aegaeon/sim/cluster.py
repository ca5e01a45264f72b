"""Devices under one dispatcher and one clock: a load in, what became of each request out."""

import contextlib
import gc
import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from aegaeon.errors import ConfigError
from aegaeon.metrics import Served
from aegaeon.sampling import SamplingParams
from aegaeon.scheduler.cost import Costs, ModelCost
from aegaeon.scheduler.places import Place
from aegaeon.scheduler.policies import Fleet, Policy
from aegaeon.sim.device import Device, Job, Usage
from aegaeon.sim.pace import Prices, exact
from aegaeon.sim.timeline import Span, Timeline
from aegaeon.sim.workloads import Arrival, Load
from aegaeon.types import ModelId, Request, Role

SAMPLING = SamplingParams(temperature=0.0)


class Failure(msgspec.Struct, frozen=True, order=True):
    """A device fails at `at_s` and does not come back; what it computed by then is with clients."""

    at_s: float
    device: int


@dataclass(frozen=True, slots=True)
class Extras:
    """What else happens in a run, and who hears of it: `progress` how many requests have come."""

    with_timeline: bool = False
    progress: Callable[[int], None] = lambda _: None
    failures: Sequence[Failure] = ()


class Gone:
    """The place of a device that has failed: nobody is there, and nobody is sent there."""

    id = ""
    load = math.inf

    def __init__(self, role: Role) -> None:
        self.role: Role = role

    def requests_of(self, model: ModelId) -> int:  # noqa: ARG002  part of the seam
        """None."""
        return 0

    def is_resident(self, model: ModelId) -> bool:  # noqa: ARG002
        """No."""
        return False

    def joins(self, model: ModelId) -> bool:  # noqa: ARG002
        """No."""
        return False


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
        self.prices = Prices(costs, models)
        self._dispatcher = policy.dispatcher()
        self._served: list[Served] = []
        self._places = policy.schedulers(fleet, costs, models)
        self._devices = [
            Device(index, scheduler, self.prices, timeline, self._on_end, self._on_handoff)
            for index, scheduler in enumerate(self._places)
        ]
        self._prefilling = [
            d
            for d, place in zip(self._devices, self._places, strict=True)
            if place.role != "decode"
        ]
        self._decoding = [
            d
            for d, place in zip(self._devices, self._places, strict=True)
            if place.role != "prefill"
        ]
        self._prefill_places: list[Place] = [self._places[d.index] for d in self._prefilling]
        self._decode_places: list[Place] = [self._places[d.index] for d in self._decoding]
        # (time, serial number, device, version of its due time or None, job handed over)
        self._heap: list[tuple[float, int, Device, Job | None]] = []
        self._serial = 0
        self._now = 0.0

    def run(self, load: Load, extras: Extras) -> list[Served]:
        """Serve `load` to its end. Raises ConfigError when failures would leave nobody to."""
        failures = sorted(extras.failures, reverse=True)
        self._check_failures(failures)
        for number, arrival in enumerate(load):
            at_s = exact(arrival.at_s)
            while failures and failures[-1].at_s <= at_s:
                self._fail(failures.pop())
            self.submit(make_job(number, arrival, at_s), at_s)
            extras.progress(number + 1)
        while failures:
            self._fail(failures.pop())
        self.advance(math.inf)
        return self._served

    def submit(self, job: Job, at_s: float) -> None:
        """`job` comes at `at_s`, a time from `exact`, and goes on from what it has."""
        self.advance(at_s)
        self._now = at_s
        self._submit(job, at_s)

    @property
    def usage(self) -> list[Usage]:
        """What each device did."""
        return [device.usage for device in self._devices]

    @property
    def now(self) -> float:
        """The time of the last event."""
        return self._now

    def lose(self, at_s: float) -> list[Job]:
        """Everything here is gone at `at_s`; return the requests as they go on elsewhere."""
        self.advance(at_s)
        jobs = [job for device in self._devices for job in device.fail(at_s)]
        for _, _, _, job in self._heap:
            if job is not None:  # on its way from one device to another
                job.context_tokens = job.saved_tokens = 0
                job.go_on(job.request.attempt + 1)
                jobs.append(job)
        self._heap.clear()
        return jobs

    @property
    def served(self) -> list[Served]:
        """What became of the requests that have ended."""
        return self._served

    @property
    def devices(self) -> list[Device]:
        """All of them, in the order of the fleet."""
        return self._devices

    @property
    def prefilling(self) -> list[Device]:
        """Those to which new requests go."""
        return self._prefilling

    def advance(self, until_s: float) -> None:
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

    def _submit(self, job: Job, now: float) -> None:
        place = self._dispatcher.dispatch(self._prefill_places, job.request.model)
        device = self._alive(self._prefilling, self._prefill_places, place)
        device.tick(now, arrived=(job,))
        self._push(device)

    @staticmethod
    def _alive(devices: Sequence[Device], places: Sequence[Place], place: int) -> Device:
        """Whom a policy chose; the least busy one if it did not see that nobody is there."""
        if isinstance(places[place], Gone):
            place = min(range(len(places)), key=lambda index: places[index].load)
        return devices[place]

    def _check_failures(self, failures: Sequence[Failure]) -> None:
        gone = {failure.device for failure in failures}
        if not gone <= set(range(len(self._devices))) or any(f.at_s < 0 for f in failures):
            raise ConfigError(f"devices fail after 0 s, and are 0 to {len(self._devices) - 1}")
        for devices in (self._prefilling, self._decoding):
            if gone >= {device.index for device in devices}:
                raise ConfigError("every device that could serve fails; let one of each role live")

    def _fail(self, failure: Failure) -> None:
        """Its requests begin anew elsewhere, behind the tokens they have; their KV is lost."""
        at_s = exact(failure.at_s)
        self.advance(at_s)
        device = self._devices[failure.device]
        jobs = device.fail(at_s)
        gone = Gone(self._places[failure.device].role)
        for devices, places in (
            (self._prefilling, self._prefill_places),
            (self._decoding, self._decode_places),
        ):
            if device in devices:
                places[devices.index(device)] = gone
        for job in jobs:
            self._now = at_s
            self._submit(job, at_s)

    def _on_end(self, job: Job, is_failed: bool) -> None:
        request = job.request
        self._served.append(
            Served(request.model, request.arrival_s, job.times_s, request.max_tokens, is_failed)
        )

    def _on_handoff(self, index: int, job: Job, now: float) -> None:
        """The KV goes to the host of the device that prefilled; from there others fetch it."""
        cost = self.prices.models[job.request.model]
        at_s = now + self.prices.move_s(cost.kv_gb(job.context_tokens))
        self._serial += 1
        heapq.heappush(self._heap, (at_s, self._serial, self._devices[index], job))

    def _adopt(self, job: Job, now: float) -> None:
        place = self._dispatcher.dispatch_prefilled(self._decode_places, job.request.model)
        device = self._alive(self._decoding, self._decode_places, place)
        device.tick(now, adopted=(job,))
        self._push(device)


def simulate(
    load: Load,
    models: Mapping[ModelId, ModelCost],
    costs: Costs,
    policy: Policy,
    fleet: Fleet,
    extras: Extras = Extras(),
) -> Simulated:
    """Return what becomes of `load`, ordered by time, of `models` on `fleet` under `policy`."""
    timeline = Timeline(is_wanted=extras.with_timeline)
    cluster = Cluster(policy, fleet, costs, models, timeline)
    with no_garbage():
        served = cluster.run(load, extras)
    return Simulated(served, cluster.usage, cluster.now, timeline.spans())


@contextlib.contextmanager
def no_garbage() -> Iterator[None]:
    """Let nobody look for cycles: a run makes millions of objects and none, and the search for
    them takes a seventh of its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def make_job(number: int, arrival: Arrival, at_s: float) -> Job:
    """Return the request of `arrival`, at `at_s`, as a job that has not begun."""
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
            key=arrival.key,
        )
    )
