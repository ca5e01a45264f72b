"""The instance's loop, one owner of all state: messages and outcomes in, actions and tokens out.

It waits on its mailbox only; lanes and signals wake it through that. Decisions are the scheduler's.
"""

import logging
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Literal

from aegaeon.clocks import brought_here
from aegaeon.deaths import Confirm
from aegaeon.engine.base import Engine, EngineUsage
from aegaeon.errors import RegionMismatch, StoreUnavailable
from aegaeon.explanations import Explain
from aegaeon.instance.answers import explain, send_on
from aegaeon.instance.apart import Apart, Suspects
from aegaeon.instance.arrivals import by_our_clock
from aegaeon.instance.at_work import AtWork
from aegaeon.instance.counts import Counts
from aegaeon.instance.lanes import Lane
from aegaeon.instance.outbox import Outbox
from aegaeon.instance.presence import Presence
from aegaeon.instance.requests import Requests
from aegaeon.instance.served import Served
from aegaeon.instance.stalls import Stalls
from aegaeon.instance.watchdog import Watchdog
from aegaeon.instance.ways import Ways
from aegaeon.scheduler.learning import Pace
from aegaeon.scheduler.policies import AnyScheduler
from aegaeon.store.base import Mailbox
from aegaeon.store.codec import decode_instance_message
from aegaeon.types import (
    Accepted,
    Cancel,
    ComputeAction,
    Declined,
    Drain,
    Handoff,
    Idle,
    InstanceStatus,
    Load,
    LoadFailed,
    ModelId,
    Outcome,
    Preload,
    Request,
    RequestId,
    Stepped,
    Submit,
    Switch,
    Switched,
    Transfer,
)

log = logging.getLogger(__name__)

MAX_WAIT_S = 0.25  # deadlines and signals are noticed at least this often
RETRY_S = 0.005  # while a proxy's mailbox is full
LOAD_DIGITS = 2  # published; finer changes are not worth telling
OUTAGE_S = 0.25  # between attempts while the store does not answer


@dataclass(frozen=True, slots=True)
class Parts:
    """What a runtime is made of; it alone calls them from here on. `clock` is the node's."""

    inbox: Mailbox
    outbox: Outbox
    presence: Presence
    engine: Engine
    scheduler: AnyScheduler
    ways: Ways  # of what goes on elsewhere
    compute: Lane[ComputeAction]
    copy: Lane[Load]
    clock: Callable[[], float]
    pause: Callable[[float], None]
    pace: Pace = field(default_factory=Pace)  # of the steps
    served: Served | None = None  # None: the models never change
    counts: Counts = field(default_factory=Counts)
    stalls: Stalls = field(default_factory=lambda: Stalls(0.0))
    watchdog: Watchdog = field(default_factory=lambda: Watchdog(0.0))
    at_work: AtWork = field(default_factory=AtWork)


class Runtime:
    """One instance. `run` returns when it is drained; a broken engine or a lost lease raises."""

    def __init__(self, parts: Parts, drain_s: float) -> None:
        self._parts = parts
        self._me = parts.presence.record.id
        self._drain_s = drain_s
        self._requests = Requests(
            parts.engine, parts.scheduler, parts.outbox, parts.presence, parts.ways
        )
        self._is_drain_wanted = False
        self._drain_ends_s: float | None = None
        self._idle_until_s: float | None = None
        self._is_ready = False
        self._actions = 0  # begun
        self._action: tuple[Apart, str] | None = None  # under way, and why
        self._suspects = Suspects()
        self._load: tuple[Load, str, str] | None = None  # likewise, with its phase
        self._load_began_s = 0.0
        self._switch_s = 0.0
        self._stall_s = 0.0
        self._stalled_at_s: float | None = None
        self._presence_due_s = 0.0
        self._records = deque[bytes]()  # that have come, perhaps as our lease ended

    def drain(self) -> None:
        """Ask the loop to take nothing new and to end; callable from a signal handler."""
        self._is_drain_wanted = True

    def run(self) -> None:
        """Serve until drained. Raises StaleIncarnation when this instance has been replaced."""
        while not self.is_drained:
            self.run_once(MAX_WAIT_S)

    @property
    def is_drained(self) -> bool:
        """Whether a drain was asked for and nothing is left to do or to send."""
        if self._drain_ends_s is None or self._requests:
            return False
        is_late = self._parts.clock() >= self._drain_ends_s
        return is_late or (
            self._requests.departures.is_empty and not self._parts.outbox.has_pending
        )

    def run_once(self, max_wait_s: float) -> None:
        """Wait for something to happen, at most `max_wait_s`, and act on it; without a lease, only
        on that."""
        if self._parts.presence.is_held(self._parts.clock()):
            self._records += self._receive(max_wait_s)
        now = self._parts.clock()
        self._tend_drain(now)
        is_held = self._parts.presence.is_held(now)
        while is_held and self._records:
            self._on_record(self._records.popleft(), now)
        self._take_outcomes(now)
        if not is_held:
            self._regain(now, max_wait_s)
            return
        self._requests.take_arrived(now)
        self._requests.end_overdue(now)
        if self._parts.served is not None:
            for model in self._parts.served.look(now, is_free=not self._parts.copy.is_busy):
                self._requests.forget_model(model)
        self._requests.look_up(now)
        if self._parts.presence.is_held(self._parts.clock()):  # the store may have kept us long
            self._start_actions(now)
            self._requests.send(now)
        self._publish(now)

    def _tend_drain(self, now: float) -> None:
        if self._is_drain_wanted and self._drain_ends_s is None:
            log.info("draining requests=%d drain_s=%.1f", len(self._requests), self._drain_s)
            self._requests.drain()
            self._drain_ends_s = now + self._drain_s
        if self._drain_ends_s is not None and now >= self._drain_ends_s:
            self._requests.abandon(now)

    def _regain(self, now: float, max_wait_s: float) -> None:
        """Nothing is begun, taken in or told until our lease goes on: others may have our requests.
        Raises StaleIncarnation when they do, and those here end with this process."""
        if not self._parts.compute.is_busy:
            self._parts.at_work.rest()  # no request is to blame for how this ends
        self._publish(now)
        if not self._parts.presence.is_held(self._parts.clock()):
            self._parts.pause(min(max_wait_s, OUTAGE_S))

    # Messages

    def _receive(self, max_wait_s: float) -> list[bytes]:
        now = self._parts.clock()
        wait_s = min(max_wait_s, max(0.0, self._presence_due_s - now))
        for due_s in (self._idle_until_s, self._requests.departures.due_s()):
            if due_s is not None:
                wait_s = min(wait_s, max(0.0, due_s - now))
        if self._parts.outbox.has_pending:
            wait_s = min(wait_s, RETRY_S)
        try:
            return self._parts.inbox.receive(wait_s)
        except StoreUnavailable as error:
            log.warning("mailbox unavailable error=%s", error)
            self._parts.pause(min(max_wait_s, OUTAGE_S))
            return []

    def _on_record(self, record: bytes, now: float) -> None:
        try:
            message = decode_instance_message(record)
        except RegionMismatch as error:
            log.error("message dropped error=%s", error)
            return
        match message:
            case Submit(request=request) | Transfer(request=request):
                self._take_in(message, request, now)
            case Cancel():
                self._requests.cancel(message, now)
            case Confirm():
                self._requests.confirm(message)
            case Accepted() | Declined():
                self._requests.departures.on_answer(message, now)
            case Preload(model=model):
                if self._parts.served is not None:
                    self._parts.served.preload(model)
            case Explain():
                explain(message, self._me, self._parts.scheduler, self._parts.outbox)
            case Drain():
                self._is_drain_wanted = True
                self._tend_drain(now)

    def _take_in(self, message: Submit | Transfer, request: Request, now: float) -> None:
        """Take a request in; should that end us, it is known which one it was."""
        served = self._parts.served
        if served is not None and served.has_left(request.model):
            send_on(message, self._me, self._parts.outbox)
            return
        self._parts.at_work.take(request.id)
        self._suspects.enter(request)
        if isinstance(message, Submit):
            self._requests.submit(brought_here(request, message.ahead_s), now)
        else:
            self._requests.on_transfer(by_our_clock(message, now), now)
        self._parts.at_work.take(None)

    # Lanes

    def _take_outcomes(self, now: float) -> None:
        parts = self._parts
        outcome = parts.compute.take() if parts.compute.is_busy else None
        if outcome is not None:
            self._on_computed(outcome, now)
        loaded = parts.copy.take() if parts.copy.is_busy else None
        if loaded is not None:
            self._on_loaded(loaded, now)

    def _on_computed(self, outcome: Outcome, now: float) -> None:
        requests, counts = self._requests, self._parts.counts
        assert self._action is not None
        apart, reason = self._action
        whole = apart.end(outcome)
        if isinstance(outcome, Stepped):
            self._suspects.gained(outcome)
        if whole is not None:
            self._action = None
            requests.end_action()
            requests.waits.end(apart.action, whole, now)
            self._parts.scheduler.complete(whole, now)
        match outcome:
            case Switched(took_s=took_s):
                self._switch_s += took_s
                counts.switched(outcome, reason)
            case Stepped(preempted=preempted):
                for model in map(requests.model_of, preempted):
                    if model is not None:
                        counts.preempted(model)
                requests.on_stepped(outcome, now)
            case LoadFailed(model=model):
                counts.load_failed(model)
                requests.on_load_failed(outcome, now)
        requests.admit_held(now)

    def _on_loaded(self, outcome: Outcome, now: float) -> None:
        assert self._load is not None
        self._parts.at_work.load(None)
        (load, phase, reason), self._load = self._load, None
        outcome = self._parts.stalls.judge(outcome, self._load_began_s, now)
        self._requests.waits.end_load(load, now)
        self._parts.counts.load_ended(load, outcome, phase, reason)
        self._parts.scheduler.complete(outcome, now)
        if isinstance(outcome, LoadFailed):
            self._requests.on_load_failed(outcome, now)

    def _start_actions(self, now: float) -> None:
        parts, leaving = self._parts, list[RequestId]()
        if self._action is not None and not parts.compute.is_busy:
            self._start_part(self._action[0], now)
        if not parts.compute.is_busy:
            leaving += self._requests.part(self._models_leaving(), now)
            while isinstance(action := parts.scheduler.next_action(now), Handoff):
                self._requests.set_apart(action.request)
                leaving.append(action.request)
            self._note_stall(isinstance(action, Idle) and len(self._requests) > 0, now)
            if isinstance(action, Idle):
                self._idle_until_s = action.until_s
                parts.at_work.rest()
            else:
                self._idle_until_s = None
                self._requests.begin(action, now)
                apart = Apart(action, self._suspects.among(action))
                self._action = apart, self._reason() if isinstance(action, Switch) else ""
                self._start_part(apart, now)
        if not parts.copy.is_busy:
            load = parts.scheduler.next_load(now)
            if load is not None:
                self._start_load(load, now)
        for request in leaving:  # beside what computes: their KV may have to be copied
            self._requests.leave(request, now)

    def _models_leaving(self) -> Collection[ModelId]:
        served = self._parts.served
        return () if served is None else served.leaving

    def _start_part(self, apart: Apart, now: float) -> None:
        if apart.is_next_alone:
            self._requests.send(now)  # what is known now: there may be no later
        part = apart.next()
        self._actions += 1
        self._parts.at_work.compute(part.model, () if isinstance(part, Switch) else part.requests)
        self._parts.compute.start(part)

    def _start_load(self, load: Load, now: float) -> None:
        parts, reason = self._parts, self._reason()
        log.info("loading model=%s evict=%s reason=%s", load.model, ",".join(load.evict), reason)
        has_weights = load.model in parts.scheduler.snapshot().resident
        self._load_began_s = now
        self._load = load, "kv" if has_weights else "load", reason
        self._requests.waits.begin_load(load, now)
        parts.counts.load_began(load, reason)
        parts.at_work.load(load.model)
        parts.copy.start(load)

    def _reason(self) -> str:
        """The code of the last decision's reason."""
        last = self._parts.scheduler.recent(None, None, 1)
        return last[-1].reason if last else ""

    def _note_stall(self, is_stalled: bool, now: float) -> None:
        """Count the time in which there are requests and nothing computes."""
        if self._stalled_at_s is not None:
            self._stall_s += now - self._stalled_at_s
        self._stalled_at_s = now if is_stalled else None

    # Status

    def _publish(self, now: float) -> None:
        usage = self._parts.engine.usage()
        status = self._status(usage, now)
        self._presence_due_s = self._parts.presence.publish(status, now)
        self._parts.counts.publish(usage, status, now)

    def _status(self, usage: EngineUsage, now: float) -> InstanceStatus:
        snapshot = self._parts.scheduler.snapshot()
        self._is_ready = self._is_ready or not snapshot.preloading
        served = self._parts.served
        speeds = {} if served is None else served.speeds(snapshot.to_prefill)
        ahead_s = sum(snapshot.to_prefill[model] * one.token_s for model, one in speeds.items())
        progress = self._actions, usage.passes, usage.moved
        is_stuck = self._parts.watchdog.is_stuck(self._parts.compute.is_busy, progress, now)
        return InstanceStatus(
            state="stuck" if is_stuck else self._state(),
            current=snapshot.current,
            resident=snapshot.resident,
            loading=snapshot.loading,
            waiting=snapshot.waiting,
            running=snapshot.running,
            kv_free_bytes=max(0, usage.kv_budget_bytes - usage.kv_bytes),
            load=round(snapshot.load, LOAD_DIGITS),
            joins=snapshot.joins,
            switches=snapshot.switches,
            switch_s=self._switch_s,
            stall_s=self._stall_s,
            compute_s=self._parts.pace.took_s,
            expected_s=self._parts.pace.expected_s,
            weight_bytes=usage.weight_bytes,
            moved=usage.moved,
            refused={} if served is None else served.refused,
            failed=self._parts.stalls.failed,
            coming=usage.coming.get(snapshot.loading or "", 0.0),
            catalog=0 if served is None else served.version,
            looked_up_tokens=usage.looked_up_tokens,
            found_tokens=usage.found_tokens,
            evicted_blocks=usage.evicted_blocks,
            ahead_s=round(ahead_s, LOAD_DIGITS),
            speeds=speeds,
        )

    def _state(self) -> Literal["starting", "ready", "draining"]:
        if self._is_drain_wanted:
            return "draining"
        return "ready" if self._is_ready else "starting"
