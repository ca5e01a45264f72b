"""The instance's loop, one owner of all state: messages and outcomes in, actions and tokens out.

It waits on its mailbox only; lanes and signals wake it through that. Decisions are the scheduler's.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from aegaeon.engine.base import Engine
from aegaeon.errors import (
    AegaeonError,
    DeadlineExceeded,
    Draining,
    RegionMismatch,
    StoreUnavailable,
)
from aegaeon.instance.lanes import Lane
from aegaeon.instance.outbox import Outbox
from aegaeon.instance.presence import Presence
from aegaeon.scheduler.base import Scheduler
from aegaeon.store.base import Mailbox
from aegaeon.store.codec import decode_instance_message
from aegaeon.types import (
    Cancel,
    ComputeAction,
    Decode,
    Drain,
    Idle,
    InstanceId,
    InstanceStatus,
    Load,
    LoadFailed,
    NewToken,
    Outcome,
    Prefill,
    Request,
    RequestFailed,
    RequestId,
    Stepped,
    Submit,
    Switched,
    TokenEvent,
)

log = logging.getLogger(__name__)

MAX_WAIT_S = 0.25  # deadlines and signals are noticed at least this often
RETRY_S = 0.005  # while a proxy's mailbox is full
OUTAGE_S = 0.5  # between attempts while the store does not answer


@dataclass(frozen=True, slots=True)
class Parts:
    """What a runtime is made of; it alone calls them from here on. `clock` is the node's."""

    inbox: Mailbox
    outbox: Outbox
    presence: Presence
    engine: Engine
    scheduler: Scheduler
    compute: Lane[ComputeAction]
    copy: Lane[Load]
    clock: Callable[[], float]
    pause: Callable[[float], None]


@dataclass(slots=True)
class _Live:
    """A request that the scheduler knows, and how many tokens it has generated so far."""

    request: Request
    position: int


class Runtime:
    """One instance. `run` returns when it is drained; a broken engine or a lost lease raises."""

    def __init__(self, instance: InstanceId, parts: Parts, drain_s: float) -> None:
        self._id = instance
        self._parts = parts
        self._drain_s = drain_s
        self._live: dict[RequestId, _Live] = {}
        self._in_action: frozenset[RequestId] = frozenset()
        self._to_release: set[RequestId] = set()  # ended while part of the running action
        self._to_submit: dict[RequestId, Request] = {}  # a next attempt, behind that release
        self._is_drain_wanted = False
        self._drain_ends_s: float | None = None
        self._idle_until_s: float | None = None
        self._is_ready = False
        self._switch_s = 0.0
        self._presence_due_s = 0.0

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
        if self._drain_ends_s is None or self._live or self._to_submit:
            return False
        is_late = self._parts.clock() >= self._drain_ends_s
        return not self._parts.outbox.has_pending or is_late

    def run_once(self, max_wait_s: float) -> None:
        """Wait for something to happen, at most `max_wait_s`, and act on it."""
        records = self._receive(max_wait_s)
        now = self._parts.clock()
        for record in records:
            self._on_record(record, now)
        if self._is_drain_wanted and self._drain_ends_s is None:
            log.info("draining requests=%d drain_s=%.1f", len(self._live), self._drain_s)
            self._drain_ends_s = now + self._drain_s
        self._take_outcomes(now)
        self._end_overdue(now)
        self._start_actions(now)
        for address in self._parts.outbox.flush(now):
            self._cancel_all_for(address, now)
        self._publish(now)

    # Messages

    def _receive(self, max_wait_s: float) -> list[bytes]:
        now = self._parts.clock()
        wait_s = min(max_wait_s, max(0.0, self._presence_due_s - now))
        if self._idle_until_s is not None:
            wait_s = min(wait_s, max(0.0, self._idle_until_s - now))
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
            case Submit(request=request):
                self._on_submit(request, now)
            case Cancel(request_id=request_id):
                self._to_submit.pop(request_id, None)
                self._end(request_id, now)
            case Drain():
                self._is_drain_wanted = True

    def _on_submit(self, request: Request, now: float) -> None:
        known = self._live.get(request.id)
        if known is not None and known.request.attempt >= request.attempt:
            return  # told twice
        if known is not None:
            self._end(request.id, now)
        if self._is_drain_wanted:
            self._refuse(request, Draining(f"{self._id} is stopping; send the request elsewhere"))
        elif request.id in self._to_release:
            self._to_submit[request.id] = request
        else:
            self._admit(request, now)

    def _admit(self, request: Request, now: float) -> None:
        """Make engine and scheduler know `request`, both or neither."""
        parts = self._parts
        try:
            # The scheduler first: it knows which models are served and what is too much.
            parts.scheduler.submit(request, now)
            parts.engine.submit(request)
        except AegaeonError as error:
            parts.scheduler.cancel(request.id, now)
            self._refuse(request, error)
            return
        self._live[request.id] = _Live(request, len(request.generated_token_ids))

    # Ends of requests

    def _end(self, request_id: RequestId, now: float) -> None:
        """Forget a request in whatever state; its KV is free now, or with the running action."""
        if self._live.pop(request_id, None) is None:
            return
        self._parts.scheduler.cancel(request_id, now)
        self._release(request_id)

    def _release(self, request_id: RequestId) -> None:
        if request_id in self._in_action:
            self._to_release.add(request_id)
        else:
            self._parts.engine.release(request_id)

    def _fail(self, request_id: RequestId, code: str, message: str, now: float) -> None:
        live = self._live.get(request_id)
        if live is None:
            return
        self._end(request_id, now)
        self._post_failure(live.request, code, message)

    def _refuse(self, request: Request, error: AegaeonError) -> None:
        self._post_failure(request, error.code, str(error))

    def _post_failure(self, request: Request, code: str, message: str) -> None:
        log.info("request failed request=%s code=%s message=%s", request.id, code, message)
        reply = RequestFailed(request.id, request.attempt, code, message, self._id)
        self._parts.outbox.post(request.reply_to, reply)

    def _cancel_all_for(self, address: str, now: float) -> None:
        """Nobody listens at `address` any more."""
        for request_id, live in tuple(self._live.items()):
            if live.request.reply_to == address:
                self._end(request_id, now)
        for request in tuple(self._to_submit.values()):
            if request.reply_to == address:
                del self._to_submit[request.id]

    def _end_overdue(self, now: float) -> None:
        for request_id in self._parts.scheduler.expired(now):
            message = "the request's deadline passed; raise --request-timeout-s or ask for less"
            self._fail(request_id, DeadlineExceeded.code, message, now)
        if self._drain_ends_s is not None and now >= self._drain_ends_s:
            for request_id in tuple(self._live):
                message = f"{self._id} stopped before the request ended; send it again"
                self._fail(request_id, Draining.code, message, now)
            self._to_submit.clear()

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
        self._in_action = frozenset()
        for request_id in self._to_release:
            self._parts.engine.release(request_id)
        self._to_release.clear()
        self._parts.scheduler.complete(outcome, now)
        match outcome:
            case Switched(took_s=took_s):
                self._switch_s += took_s
            case Stepped(tokens=tokens, failed=failed):
                for token in tokens:
                    self._on_token(token)
                for request_id, code, message in failed:
                    self._fail(request_id, code, message, now)
        resubmitted, self._to_submit = self._to_submit, {}
        for request in resubmitted.values():
            self._admit(request, now)

    def _on_token(self, token: NewToken) -> None:
        live = self._live.get(token.request_id)
        if live is None:
            return  # cancelled while it was made
        request = live.request
        reply = TokenEvent(
            request_id=request.id,
            attempt=request.attempt,
            position=live.position,
            token_ids=(token.token_id,),
            instance=self._id,
            finish_reason=token.finish_reason,
        )
        self._parts.outbox.post(request.reply_to, reply)
        live.position += 1
        if token.finish_reason is not None:
            del self._live[request.id]
            self._parts.engine.release(request.id)

    def _on_loaded(self, outcome: Outcome, now: float) -> None:
        self._parts.scheduler.complete(outcome, now)
        if isinstance(outcome, LoadFailed):
            log.error("load failed model=%s error=%s", outcome.model, outcome.message)
            for request_id, live in tuple(self._live.items()):
                if live.request.model == outcome.model:
                    self._fail(request_id, outcome.code, outcome.message, now)

    def _start_actions(self, now: float) -> None:
        parts = self._parts
        if not parts.compute.is_busy:
            action = parts.scheduler.next_action(now)
            if isinstance(action, Idle):
                self._idle_until_s = action.until_s
            else:
                self._idle_until_s = None
                if isinstance(action, Prefill | Decode):
                    self._in_action = frozenset(action.requests)
                parts.compute.start(action)
        if not parts.copy.is_busy:
            load = parts.scheduler.next_load(now)
            if load is not None:
                log.info("loading model=%s evict=%s", load.model, ",".join(load.evict))
                parts.copy.start(load)

    # Status

    def _publish(self, now: float) -> None:
        self._presence_due_s = self._parts.presence.publish(self._status(), now)

    def _status(self) -> InstanceStatus:
        snapshot = self._parts.scheduler.snapshot()
        self._is_ready = self._is_ready or not snapshot.preloading
        usage = self._parts.engine.usage()
        return InstanceStatus(
            state=self._state(),
            current=snapshot.current,
            resident=snapshot.resident,
            loading=snapshot.loading,
            waiting=snapshot.waiting,
            running=snapshot.running,
            kv_free_bytes=max(0, usage.kv_budget_bytes - usage.kv_bytes),
            switches=snapshot.switches,
            switch_s=self._switch_s,
        )

    def _state(self) -> Literal["starting", "ready", "draining"]:
        if self._is_drain_wanted:
            return "draining"
        return "ready" if self._is_ready else "starting"
