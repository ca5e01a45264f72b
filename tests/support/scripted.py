"""A device without an engine: drives a scheduler in simulated time and checks what it may do."""

from collections import Counter
from dataclasses import dataclass, field

import msgspec

from aegaeon.scheduler.base import Scheduler
from aegaeon.scheduler.groups import counts_of
from aegaeon.types import (
    Decode,
    Handoff,
    Idle,
    Load,
    Loaded,
    LoadFailed,
    NewToken,
    Prefill,
    Request,
    Stepped,
    Switch,
    Switched,
    WeightsLost,
)

SWITCH_S = 0.05
STEP_S = 0.02
LOAD_S = 0.3
SHORTAGE = "0 of 1 slots are free"


@dataclass
class ScriptedDevice:
    """Two lanes in simulated time. KV is counted in sequences; `failing` models never load.

    What is handed off stays in `leaving`, with its KV, until `depart`.
    """

    scheduler: Scheduler
    sizes: dict[str, int]
    budget_bytes: int
    kv_slots: int = 1 << 30
    failing: frozenset[str] = frozenset()
    now: float = 0.0
    known: dict[str, Request] = field(default_factory=dict)
    made: Counter = field(default_factory=Counter)
    ends: dict[str, str] = field(default_factory=dict)
    first_token_s: dict[str, float] = field(default_factory=dict)
    resident: set[str] = field(default_factory=set)
    loads: list[Load] = field(default_factory=list)
    steps: list[Prefill | Decode] = field(default_factory=list)
    leaving: list[str] = field(default_factory=list)
    parting: set[str] = field(default_factory=set)  # to leave as soon as they run and may
    troubles: dict[str, object] = field(default_factory=dict)  # of a model's next action
    holders: list[str] = field(default_factory=list)  # sequences with KV
    reasons: dict[str, tuple[str, str]] = field(default_factory=dict)  # of those given up
    _idle_until_s: float | None = None
    _compute: tuple[float, object] | None = None
    _copy: tuple[float, Load] | None = None

    def submit(self, request: Request) -> None:
        request = self.arrived(request)
        self.scheduler.submit(request, self.now)
        self.known[request.id] = request

    def arrived(self, request: Request) -> Request:
        """It comes now, unless it says when it came."""
        return msgspec.structs.replace(request, arrival_s=request.arrival_s or self.now)

    def cancel(self, request_id: str) -> None:
        self.scheduler.cancel(request_id, self.now)
        self.end(request_id, "cancelled")

    def end(self, request_id: str, how: str) -> None:
        if request_id in self.known:
            assert request_id not in self.ends
            self.ends[request_id] = how
            del self.known[request_id]
            self.drop_kv(request_id)

    def drop_kv(self, request_id: str) -> None:
        if request_id in self.holders:
            self.holders.remove(request_id)

    def adopt(self, request: Request) -> None:
        request = self.arrived(request)
        self.scheduler.adopt(request, self.now)
        self.known[request.id] = request
        self.holders.append(request.id)

    def depart(self, request_id: str) -> None:
        self.leaving.remove(request_id)
        self.scheduler.cancel(request_id, self.now)
        self.end(request_id, "handed off")

    def lose(self, model: str) -> None:
        """Another instance evicts the model; the next action finds out."""
        self.resident.discard(model)
        self.troubles[model] = WeightsLost(model)

    def ask(self) -> None:
        """Let the scheduler fill the free lanes, as the runtime does."""
        for request_id, code, message in self.scheduler.given_up():
            self.scheduler.cancel(request_id, self.now)
            self.end(request_id, "given up")
            self.reasons[request_id] = (code, message)
        if self._compute is None:
            for request_id in sorted(self.parting):
                if self.scheduler.standing_of(request_id) == "running":
                    self.scheduler.part(request_id)
                    self.leaving.append(request_id)
                    self.parting.remove(request_id)
            while isinstance(action := self.scheduler.next_action(self.now), Handoff):
                self.leaving.append(action.request)
            self._idle_until_s = action.until_s if isinstance(action, Idle) else None
            if not isinstance(action, Idle):
                assert action.model in {*self.resident, *self.troubles}, f"{action} is not resident"
                took_s = SWITCH_S if isinstance(action, Switch) else STEP_S
                self._compute = (self.now + took_s, action)
                self.check_step(action)
            else:
                assert action.until_s is None or action.until_s > self.now
        if self._copy is None:
            load = self.scheduler.next_load(self.now)
            if load is not None:
                self.check_load(load)
                self._copy = (self.now + LOAD_S, load)
        self.check_counts()

    def check_counts(self) -> None:
        """What others are told is so: it is not counted anew with each step."""
        told, counted = self.scheduler.snapshot(), counts_of(self.scheduler._groups)
        assert (told.waiting, told.running) == (counted.waiting, counted.running)
        assert told.to_prefill == counted.to_prefill

    def check_step(self, action) -> None:
        if isinstance(action, Prefill | Decode):
            self.steps.append(action)
            assert action.requests and len(set(action.requests)) == len(action.requests)
            for request_id in action.requests:
                assert self.known[request_id].model == action.model

    def check_load(self, load: Load) -> None:
        busy = self._compute[1].model if self._compute else None
        assert load.model not in self.resident - set(load.evict)
        assert busy not in load.evict
        self.resident -= set(load.evict)
        self.loads.append(load)
        held = sum(self.sizes[model] for model in (*self.resident, load.model))
        assert held <= self.budget_bytes

    def advance(self, until_s: float) -> None:
        """Run until nothing is under way or `until_s`."""
        while True:
            self.ask()
            due = [lane[0] for lane in (self._compute, self._copy) if lane is not None]
            if self._idle_until_s is not None:
                due.append(self._idle_until_s)
            if not due or min(due) > until_s:
                self.now = max(self.now, until_s)
                return
            self.now = min(due)
            self.finish()

    def finish(self) -> None:
        if self._compute is not None and self._compute[0] <= self.now:
            action, self._compute = self._compute[1], None
            trouble = self.troubles.pop(action.model, None)
            if trouble is not None:
                self.resident.discard(action.model)
                self.scheduler.complete(trouble, self.now)
                if isinstance(trouble, LoadFailed):
                    self.fail(action.model)
            elif isinstance(action, Switch):
                self.scheduler.complete(Switched(action.model, SWITCH_S), self.now)
            else:
                outcome = self.step(action)
                self.scheduler.complete(outcome, self.now)
                for token in outcome.tokens:
                    if token.finish_reason is not None:
                        self.end(token.request_id, "finished")
        if self._copy is not None and self._copy[0] <= self.now:
            load, self._copy = self._copy[1], None
            if load.model in self.failing:
                self.scheduler.complete(LoadFailed(load.model, "x", "y"), self.now)
                self.fail(load.model)
            else:
                self.resident.add(load.model)
                self.scheduler.complete(
                    Loaded(load.model, self.sizes[load.model], LOAD_S), self.now
                )

    def fail(self, model: str) -> None:
        for request in list(self.known.values()):
            if request.model == model and request.id not in self.leaving:
                self.end(request.id, "failed")

    def make_room(self, oldest_first: list[str], age: dict[str, int]) -> list[str]:
        """Give each a slot; return those of any model that lost or did not get theirs."""
        preempted: list[str] = []
        for request_id in oldest_first:
            if request_id in self.holders or request_id in preempted:
                continue
            if len(self.holders) >= self.kv_slots:
                holders = [held for held in self.holders if held not in self.leaving]
                victim = max(holders, key=age.__getitem__, default=request_id)
                if age[victim] <= age[request_id]:
                    preempted.append(request_id)
                    continue
                self.holders.remove(victim)
                preempted.append(victim)
            self.holders.append(request_id)
        return preempted

    def step(self, action: Prefill | Decode) -> Stepped:
        """Like an engine: without room the newest sequence of any model loses its KV."""
        tokens = []
        age = {request_id: number for number, request_id in enumerate(self.known)}
        wanted = [request_id for request_id in action.requests if request_id in self.known]
        preempted = self.make_room(sorted(wanted, key=age.__getitem__), age)
        for request_id in wanted:  # others were cancelled meanwhile
            if request_id in preempted:
                continue
            request = self.known[request_id]
            self.made[request_id] += 1
            self.first_token_s.setdefault(request_id, self.now)
            is_last = self.made[request_id] >= request.max_tokens
            tokens.append(NewToken(request_id, 7, "length" if is_last else None))
        return Stepped(
            action.model, tuple(tokens), STEP_S, preempted=tuple(preempted), shortage=SHORTAGE
        )
