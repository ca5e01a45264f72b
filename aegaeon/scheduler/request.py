"""The policy `request`: whole requests in the order in which they came, as ServerlessLLM scales.

A device serves one model at a time: the first one in its queue, until all its requests there have
ended. It is the baseline; nothing is prefetched, and a switch costs the whole load.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from aegaeon.errors import Overloaded
from aegaeon.scheduler.device import DeviceScheduler
from aegaeon.scheduler.groups import Entry, Group
from aegaeon.scheduler.ledger import Limits
from aegaeon.scheduler.places import Dispatcher, Place
from aegaeon.scheduler.residency import Residency
from aegaeon.types import (
    Decode,
    InstanceId,
    Load,
    ModelId,
    Outcome,
    Prefill,
    Request,
    RequestId,
    Role,
    Stretch,
)


class RequestRules(msgspec.Struct, frozen=True, kw_only=True):
    """The baseline's rules; what else they might be, so that a run can show what it is worth."""

    slots: int = 4  # requests in a device's queue, before another device is taken
    patience_s: float = 15.0  # a request that has no token by then is dropped
    serves_tail: bool = False  # the last model of a queue is the next, not the first
    counts_running: bool = True  # as queued; else a queue is those that wait for their prefill
    # Least recently used is who computed last the longest ago, whether idle or loading; else who
    # was sent a request the longest ago, and idle ones before others.
    used_is_computed: bool = False


@dataclass(slots=True, eq=False)
class Run:
    """Requests of one model that stand in a queue one behind the other."""

    model: ModelId
    members: dict[RequestId, None] = field(default_factory=dict)


class RequestScheduler(DeviceScheduler[Group]):
    """A queue, whose front model has the device. Nobody is pre-empted, but for want of KV."""

    def __init__(
        self,
        residency: Residency,
        models: Sequence[ModelId],
        limits: Limits,
        role: Role,
        rules: RequestRules = RequestRules(),  # noqa: B008  frozen
    ) -> None:
        """`models` are those served. Nothing is resident yet."""
        super().__init__(residency, models, limits, role)
        self._rules = rules
        self._turn: Run | None = None  # has begun, with its load
        self._queue: list[Run] = []
        self._computed_s = -math.inf  # when the last step ended
        self._untried: deque[tuple[float, Entry, ModelId]] = deque()  # by when a token is due

    @property
    def load(self) -> float:
        """The requests that count as queued."""
        return len(self._model_of) if self._rules.counts_running else self._waiting_count

    @property
    def computed_s(self) -> float:
        """When it computed last; infinite while it does."""
        return math.inf if isinstance(self._in_flight, Prefill | Decode) else self._computed_s

    def joins(self, model: ModelId) -> bool:
        """Whether `model` is the last one of the queue, or the one here when that is empty."""
        if self._queue:
            return self._queue[-1].model == model
        return self.is_resident(model)

    # What happens

    def _new_group(self, model: ModelId) -> Group:
        return Group(model)

    def _entered(self, group: Group, entry: Entry, now: float) -> None:
        if not self._queue or self._queue[-1].model != group.model:
            self._queue.append(Run(group.model))
        self._queue[-1].members[entry.id] = None
        if entry.id in group.waiting:
            self._untried.append((now + self._rules.patience_s, entry, group.model))

    def submit(self, request: Request, now: float) -> None:
        """As any scheduler's; whoever has waited too long is given up."""
        super().submit(request, now)
        self._give_up_late(now)

    def complete(self, outcome: Outcome, now: float) -> None:
        """As any scheduler's; whoever has waited too long is given up."""
        super().complete(outcome, now)
        self._give_up_late(now)

    def _give_up_late(self, now: float) -> None:
        while self._untried and self._untried[0][0] <= now:
            _, entry, model = self._untried.popleft()
            group = self._groups.get(model)  # none: the model has been removed
            if group is None or entry.made:
                continue
            if group.waiting.get(entry.id) is entry:
                message = f"no token after {self._rules.patience_s:g} s; try again later"
                self._hopeless.append((entry.id, Overloaded.code, message))

    def _stepped(self, group: Group, action: Prefill | Decode, now: float) -> None:  # noqa: ARG002
        self._computed_s = now
        if self._role == "prefill":
            self._changed(group)

    def _changed(self, group: Group) -> None:
        """Let go what has ended or left, and join what it kept apart."""
        for run in [one for one in self._queue if one.model == group.model]:
            gone = [r for r in run.members if r not in group.waiting and r not in group.running]
            for request in gone:
                del run.members[request]
            if not run.members:
                self._queue.remove(run)
        for place in range(len(self._queue) - 1, 0, -1):
            if self._queue[place].model == self._queue[place - 1].model:
                joined = self._queue.pop(place)
                self._queue[place - 1].members |= joined.members
                if self._turn is joined:
                    self._turn = self._queue[place - 1]

    # Whose step

    def _front(self, now: float) -> Run | None:
        """Who has begun, or the first of the queue: of those that can make progress, now or once
        they are loaded."""
        order = self._queue[::-1] if self._rules.serves_tail else self._queue
        has_begun = [run for run in self._queue if run is self._turn]
        for run in has_begun + order:
            group = self._groups[run.model]
            is_coming = self.is_resident(run.model) or group.load_at_s <= now
            if is_coming and (self._running(run) or self._may_prefill(run, now)):
                return run
        return None

    def _running(self, run: Run) -> list[RequestId]:
        group = self._groups[run.model]
        return [request for request in run.members if request in group.running]

    def _waiting(self, run: Run) -> list[Entry]:
        group = self._groups[run.model]
        return [group.waiting[request] for request in run.members if request in group.waiting]

    def _may_prefill(self, run: Run, now: float) -> bool:
        group = self._groups[run.model]
        has_room = len(group.running) < self._limits.max_running
        return has_room and bool(self._waiting(run)) and self._kv.may_prefill(group, now)

    def _choose(self, now: float) -> Group | None:
        run = self._front(now)
        if run is None or not self._residency.is_resident(run.model):
            return None
        self._turn = run
        group = self._groups[run.model]
        if group.away and not self._here(run) and not self._may_prefill(run, now):
            self._reason = "kv_not_here"
            return None
        self._reason = "front_of_queue"
        return group

    def _here(self, run: Run) -> list[RequestId]:
        running = self._groups[run.model].running
        return [request for request in self._running(run) if running[request].is_here]

    def _step(self, group: Group, now: float) -> Prefill | Decode | None:
        run = self._front(now)
        assert run is not None
        here = self._here(run)
        if self._may_prefill(run, now):
            picked = self._pick_prefill(run, group, has_others=bool(here))
            if picked:
                return Prefill(group.model, picked)
        requests = here[: self._limits.max_batch]
        while len(requests) > 1 and not self._steps_that_fit(group, len(requests)):
            self._put_back(group, (requests.pop(),))
        stretch = Stretch(
            1 if len(here) > len(requests) else max(1, self._steps_that_fit(group, len(requests))),
            until_s=self._untried[0][0] if self._untried else math.inf,
        )
        return Decode(group.model, tuple(requests), stretch)

    def _pick_prefill(self, run: Run, group: Group, *, has_others: bool) -> tuple[RequestId, ...]:
        """The first ones within the bounds and the memory; one at least, unless others run."""
        limits = self._limits
        most = min(limits.prefill_requests, limits.max_running - len(group.running))
        if group.kv_ticket is not None and not self._kv.is_held():
            most = 1  # alone it fits, or the engine refuses it
        free = self._residency.free_bytes - self._residency.kv_margin_bytes * has_others
        tokens = 0
        picked: list[RequestId] = []
        for entry in self._waiting(run)[:most]:
            tokens += entry.tokens + 1
            is_too_much = self._residency.kv_bytes(group.model, tokens) > free
            if picked and (is_too_much or tokens > limits.prefill_tokens):
                break
            if is_too_much and has_others:
                break
            picked.append(entry.id)
        return tuple(picked)

    # Loads

    def _pick_load(self, now: float) -> Load | None:
        """The front model, in the place of all others, once nothing of theirs computes. Then KV
        that others have prefilled."""
        run = self._front(now)
        if run is None or self._in_flight is not None:
            return None
        self._reason = "front_of_queue"
        self._turn = run
        if not self._residency.is_resident(run.model):
            return Load(run.model, self._residency.evictable)
        bring = self._pick_bring(run)
        return Load(run.model, bring=bring) if bring else None

    def _pick_bring(self, run: Run) -> tuple[RequestId, ...]:
        """Whose KV comes, of those that others have prefilled: as many as there is room for."""
        running = self._groups[run.model].running
        is_first = not self._here(run)
        free = self._residency.free_bytes - self._residency.kv_margin_bytes
        picked: list[RequestId] = []
        for request in self._running(run):
            if running[request].is_here:
                continue
            free -= self._residency.kv_bytes(run.model, running[request].tokens)
            if free < 0 and not (is_first and not picked):
                break
            picked.append(request)
        return tuple(picked)


class RequestDispatcher(Dispatcher):
    """To a device of the model with a free slot; else the least recently used one becomes one."""

    def __init__(self, rules: RequestRules = RequestRules()) -> None:  # noqa: B008  frozen
        self._rules = rules
        self._used: dict[InstanceId, int] = {}  # the number of the last request sent there
        self._sent = 0

    def dispatch(self, places: Sequence[Place], model: ModelId) -> int:
        """Return the place for one request more of `model`."""
        own = [index for index, place in enumerate(places) if place.joins(model)]
        slots = sum(max(0, self._rules.slots - int(places[index].load)) for index in own)
        others = [index for index in range(len(places)) if index not in own]
        if others and not slots:
            chosen = min(others, key=lambda index: self._recency(places[index]))
        else:
            chosen = min(own, key=lambda index: places[index].load)
        self._sent += 1
        self._used[places[chosen].id] = self._sent
        return chosen

    def _recency(self, place: Place) -> tuple[float, int]:
        """Return what is least for the place that was used the longest ago."""
        sent = self._used.get(place.id, 0)
        if not self._rules.used_is_computed:
            return place.load > 0, sent
        # Instances do not publish it.
        return place.computed_s if isinstance(place, RequestScheduler) else math.inf, sent

    def dispatch_prefilled(self, places: Sequence[Place], model: ModelId) -> int:
        """As `dispatch`."""
        return self.dispatch(places, model)
