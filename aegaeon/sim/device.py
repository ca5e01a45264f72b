"""One simulated device: a scheduler, and two lanes that take the time that the costs say.

It does what the live loop does, in the same order: messages, then what the lanes have ended, then
new actions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from aegaeon.metrics import TokenRuns
from aegaeon.scheduler.policies import AnyScheduler
from aegaeon.sim.pace import Pace, Prices
from aegaeon.sim.timeline import Timeline
from aegaeon.types import (
    Action,
    Begun,
    ComputeAction,
    Decode,
    Handoff,
    Idle,
    Load,
    Loaded,
    ModelId,
    NewToken,
    Prefill,
    Ran,
    Request,
    RequestId,
    Stepped,
    Switch,
    Switched,
)


@dataclass(slots=True)
class Job:
    """A request on its way: what it wants, what it has got, where its KV is."""

    request: Request
    times_s: TokenRuns = field(default_factory=TokenRuns)
    context_tokens: int = 0  # that its KV holds
    saved_tokens: int = 0  # of them on the host, too

    @property
    def made(self) -> int:
        """Tokens so far."""
        return len(self.times_s)

    @property
    def missing(self) -> int:
        """Tokens still to make."""
        return self.request.max_tokens - len(self.times_s)

    def go_on(self, attempt: int) -> None:
        """Another device is asked to go on behind the tokens so far."""
        self.request = msgspec.structs.replace(
            self.request, generated_token_ids=(0,) * self.made, attempt=attempt
        )


@dataclass(slots=True)
class Usage:
    """What a device spent its time on, in seconds, and how often."""

    compute_s: float = 0.0
    switch_s: float = 0.0
    stall_s: float = 0.0  # nothing computed, though there were requests
    link_s: float = 0.0
    switches: int = 0
    loads: int = 0
    kv_moved_gb: float = 0.0


class Device:
    """Runs one scheduler. `due_s` is when something ends there; call `tick` then, or earlier with
    what has arrived."""

    def __init__(
        self,
        index: int,
        scheduler: AnyScheduler,
        prices: Prices,
        timeline: Timeline,
        on_end: Callable[[Job, bool], None],
        on_handoff: Callable[[int, Job, float], None],
    ) -> None:
        """`on_end` hears of requests that ended and whether they failed, `on_handoff` of those
        that go on elsewhere."""
        self.index = index
        self.scheduler = scheduler
        self.usage = Usage()
        self.due_s = math.inf
        self.jobs: dict[RequestId, Job] = {}
        self._prices = prices
        self._timeline = timeline
        self._on_end = on_end
        self._on_handoff = on_handoff
        self._resident: set[ModelId] = set()
        self._action: ComputeAction | None = None
        self._action_began_s = 0.0
        self._action_ends_s = math.inf
        self._pace: Pace | None = None  # of a decode
        self._steps = 0  # of it
        self._load: Load | None = None
        self._load_began_s = 0.0
        self._load_ends_s = math.inf
        self._is_early = False  # a load of weights: may end while they come
        self._coming: ModelId | None = None  # whose did, and when all are in
        self._whole_s = -math.inf
        self._waits_s = 0.0  # of a prefill, for weights
        self._spans: list[tuple[int, int]] = []  # of its prompts
        self._rests_since_s = 0.0  # while nothing computes
        self._idle_until_s = math.inf
        self._idle_since_s = math.inf

    def tick(
        self, now: float, arrived: tuple[Job, ...] = (), adopted: tuple[Job, ...] = ()
    ) -> None:
        """Bring the device to `now`: take what arrived, end what has ended, begin what is next."""
        if self._pace is not None and now < self._action_ends_s:
            self._end_steps_before(now)
        for job in arrived:
            self.jobs[job.request.id] = job
            self.scheduler.submit(job.request, now)
        for job in adopted:
            self.jobs[job.request.id] = job
            tokens = (0,) * job.made  # those that it has, as live
            request = msgspec.structs.replace(job.request, generated_token_ids=tokens)
            self.scheduler.adopt(request, now)
        if self._action_ends_s <= now:
            self._end_action(now)
        if self._next_load_end_s() <= now:
            self._end_load(now)
        self._end_hopeless(now)
        self._begin(now)
        self.due_s = min(self._action_ends_s, self._next_load_end_s(), self._idle_until_s)
        if self._load is None and self._whole_s > now:
            self.due_s = min(self.due_s, self._whole_s)

    def fail(self, now: float) -> list[Job]:
        """End for good; return its requests as they go on elsewhere: with the tokens of steps that
        are over, without KV."""
        self.tick(now)
        self.due_s = math.inf
        self.usage.link_s -= max(0.0, self._whole_s - now)  # what was still to come
        jobs = list(self.jobs.values())
        self.jobs.clear()
        for job in jobs:
            job.context_tokens = job.saved_tokens = 0
            job.go_on(job.request.attempt + 1)
        return jobs

    # Ends

    def _end_steps_before(self, now: float) -> None:
        """Something happens in the middle of a run of decode steps: those that are over count, and
        the scheduler is heard after the one under way."""
        assert self._pace is not None
        steps = self._pace.steps_before(now, self._steps - 1)
        if steps:
            at_s = self._pace.end_s(steps)
            self._end_run(steps, at_s)
            self._begin(at_s)
        self._end_run_soon()

    def _end_run_soon(self) -> None:
        """Something has happened: the scheduler is heard after the step under way."""
        if self._pace is not None:
            self._steps = 1
            self._action_ends_s = self._pace.end_s(1)

    def _end_action(self, now: float) -> None:
        action = self._action
        took_s = now - self._action_began_s
        match action:
            case Decode():
                self._end_run(self._steps, now)
            case Prefill():
                self._rest(now)
                self.usage.compute_s += took_s - self._waits_s
                self.usage.stall_s += self._waits_s
                self._timeline.add(self.index, "prefill", action.model, self._action_began_s, now)
                self._end_prefill(action, took_s, now)
            case Switch():
                self._rest(now)
                self.usage.switch_s += took_s
                self.usage.switches += 1
                self._timeline.add(self.index, "switch", action.model, self._action_began_s, now)
                self.scheduler.complete(Switched(action.model, took_s), now)

    def _rest(self, now: float) -> None:
        """The action is over."""
        self._action, self._pace, self._action_ends_s = None, None, math.inf
        self._rests_since_s = now

    def _end_prefill(self, action: Prefill, took_s: float, now: float) -> None:
        tokens = []
        begun = []
        ended = []
        for request, (start, stop) in zip(action.requests, self._spans, strict=True):
            job = self.jobs.get(request)
            if job is None:
                continue
            if stop < self._prefill_tokens(job):
                job.context_tokens = stop
                job.saved_tokens = min(job.saved_tokens, start)
                begun.append(Begun(request, stop, start))
                continue
            job.times_s.add(now, 0.0, 0.0, 1)
            job.context_tokens = len(job.request.prompt_token_ids) + job.made
            job.saved_tokens = 0
            is_last = job.missing <= 0
            tokens.append(NewToken(request, 0, "length" if is_last else None))
            if is_last:
                ended.append(job)
        outcome = Stepped(action.model, tuple(tokens), took_s, begun=tuple(begun))
        self.scheduler.complete(outcome, now)
        for job in ended:
            self._end_job(job, is_failed=False)

    def _end_run(self, steps: int, now: float) -> None:
        action, pace = self._action, self._pace
        assert isinstance(action, Decode) and pace is not None
        self._rest(now)
        ended = []
        for request in action.requests:
            job = self.jobs.get(request)
            if job is None:
                continue
            job.times_s.add(pace.start_s, pace.step_s, pace.growth_s, steps)
            job.context_tokens += steps
            if job.missing <= 0:
                ended.append(job)
        took_s = now - pace.start_s
        self.usage.compute_s += took_s
        self._timeline.add(self.index, "decode", action.model, pace.start_s, now)
        names = tuple(job.request.id for job in ended)
        self.scheduler.complete(Ran(action.model, steps, names, took_s), now)
        for job in ended:
            self._end_job(job, is_failed=False)

    def _next_load_end_s(self) -> float:
        """When a load is over for the scheduler: all is in, or the device at rest for a while."""
        may_be_early = self._is_early and self._load is not None and self._action is None
        begun_s = max(self._rests_since_s, self._load_began_s)
        early_s = begun_s + self._prices.rest_s if may_be_early else math.inf
        return min(self._load_ends_s, early_s)

    def _end_load(self, now: float) -> None:
        load, self._load = self._load, None
        assert load is not None
        took_s = now - self._load_began_s
        self._coming, self._whole_s = load.model, self._load_ends_s
        self._load_ends_s = math.inf
        self.usage.link_s += self._whole_s - self._load_began_s
        weight_bytes = round(self._prices.models[load.model].weight_gb * 1e9)
        if took_s:
            self._timeline.add(self.index, "load", load.model, self._load_began_s, self._whole_s)
        self._resident.add(load.model)
        is_whole = self._whole_s <= now
        self.scheduler.complete(Loaded(load.model, weight_bytes, took_s, (), is_whole), now)

    def _end_hopeless(self, now: float) -> None:
        for request, _, _ in self.scheduler.given_up():
            self._fail(request, now)
        for request in self.scheduler.expired(now):
            self._fail(request, now)

    def _fail(self, request: RequestId, now: float) -> None:
        self.scheduler.cancel(request, now)
        self._end_job(self.jobs[request], is_failed=True)

    def _end_job(self, job: Job, *, is_failed: bool) -> None:
        del self.jobs[job.request.id]
        self._on_end(job, is_failed)

    # Begins

    def _begin(self, now: float) -> None:
        if self._action is None:
            action: Action = self.scheduler.next_action(now)
            while isinstance(action, Handoff):
                self._hand_off(action.request, now)
                action = self.scheduler.next_action(now)
            self._begin_action(action, now)
        if self._load is None and self._whole_s <= now:
            load = self.scheduler.next_load(now)
            if load is not None:
                self._begin_load(load, now)
                self._end_run_soon()

    def _hand_off(self, request: RequestId, now: float) -> None:
        job = self.jobs.pop(request)
        job.saved_tokens = job.context_tokens
        job.go_on(job.request.attempt)
        self._on_handoff(self.index, job, now)
        self.scheduler.cancel(request, now)

    def _begin_action(self, action: Action, now: float) -> None:
        if isinstance(action, Idle):
            self._idle_until_s = math.inf if action.until_s is None else action.until_s
            if self.jobs and self._idle_since_s == math.inf:
                self._idle_since_s = now
            return
        self._idle_until_s = math.inf
        if self._idle_since_s < math.inf:
            self.usage.stall_s += now - self._idle_since_s
            self._idle_since_s = math.inf
        self._action = action  # type: ignore[assignment]  # a Handoff never comes here
        self._action_began_s = now
        match action:
            case Decode():
                self._begin_decode(action, now)
            case Prefill():
                self._begin_prefill(action, now)
            case Switch():
                assert action.model in self._resident, f"{action.model} is not resident"
                self._action_ends_s = now + self._prices.switch_s

    def _begin_prefill(self, action: Prefill, now: float) -> None:
        jobs = [self.jobs[request] for request in action.requests]
        starts = [
            job.context_tokens if self.scheduler.has_begun(job.request.id) else 0 for job in jobs
        ]
        missing = [self._prefill_tokens(job) - at for job, at in zip(jobs, starts, strict=True)]
        shares = action.shares(missing)
        self._spans = [(at, at + share) for at, share in zip(starts, shares, strict=True)]
        ends_s = now + self._prices.prefill_s(action.model, self._spans)
        self._action_ends_s = max(ends_s, self._in_s(action.model))
        self._waits_s = self._action_ends_s - ends_s

    def _begin_decode(self, action: Decode, now: float) -> None:
        jobs = [self.jobs[request] for request in action.requests]
        context = sum(job.context_tokens for job in jobs)
        start_s = max(now, self._in_s(action.model))
        self.usage.stall_s += start_s - now
        pace = self._prices.steps(action.model).pace(start_s, context, len(jobs))
        self._pace = pace
        self._steps = pace.steps_of(action.stretch, min(job.missing for job in jobs))
        self._action_ends_s = pace.end_s(self._steps)

    @staticmethod
    def _prefill_tokens(job: Job) -> int:
        return len(job.request.prompt_token_ids) + job.made

    def _in_s(self, model: ModelId) -> float:
        """When the last of a resident model's weights are in, if they are not yet."""
        return self._whole_s if model == self._coming else -math.inf

    def _begin_load(self, load: Load, now: float) -> None:
        busy = None if self._action is None else self._action.model
        assert busy is None or busy not in load.evict, f"{busy} computes"
        self._resident.difference_update(load.evict)
        cost = self._prices.models[load.model]
        moved = 0.0
        for request in load.offload:
            job = self.jobs[request]
            unsaved = job.context_tokens - job.saved_tokens
            moved += self._prices.models[job.request.model].kv_gb(unsaved)
            job.saved_tokens = job.context_tokens
        moved += sum(cost.kv_gb(self.jobs[request].context_tokens) for request in load.bring)
        self.usage.kv_moved_gb += moved
        self._load, self._load_began_s = load, now
        self._load_ends_s = now + self._prices.move_s(moved)
        self._is_early = load.model not in self._resident
        if self._is_early:
            self._load_ends_s += self._prices.load_s(load.model)
            self.usage.loads += 1
