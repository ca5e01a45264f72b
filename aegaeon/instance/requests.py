"""The requests of an instance: how they come, go on elsewhere and end, in every state. Keeps engine
and scheduler of one mind about which there are. The loop and the lanes are runtime.py."""

import logging
from collections.abc import Collection, Iterable
from functools import partial

from aegaeon.deaths import Confirm
from aegaeon.engine.base import Engine
from aegaeon.errors import (
    AegaeonError,
    DeadlineExceeded,
    Draining,
    Forgotten,
    InvalidRequest,
    Overloaded,
)
from aegaeon.instance.arrivals import Arrivals
from aegaeon.instance.departures import Departures, Ends, Failure
from aegaeon.instance.evacuation import Evacuation
from aegaeon.instance.known import Known
from aegaeon.instance.live import Live
from aegaeon.instance.outbox import Outbox
from aegaeon.instance.presence import Presence
from aegaeon.instance.waits import State, Waits
from aegaeon.instance.ways import Ways
from aegaeon.scheduler.policies import AnyScheduler
from aegaeon.types import (
    Accepted,
    Cancel,
    ComputeAction,
    Declined,
    Decode,
    LoadFailed,
    ModelId,
    Moved,
    NewToken,
    Prefill,
    Request,
    RequestFailed,
    RequestId,
    Stepped,
    Transfer,
)

log = logging.getLogger(__name__)


class Requests:
    """Owned by one runtime. What a proxy or another instance is told goes by `outbox`."""

    def __init__(
        self,
        engine: Engine,
        scheduler: AnyScheduler,
        outbox: Outbox,
        presence: Presence,
        ways: Ways,
    ) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._outbox = outbox
        self._record = presence.record
        self._arrivals = Arrivals(self._record.id, engine, scheduler, ways.pulls)
        self.departures = Departures(
            self._record,
            outbox,
            presence.peers,
            ways,
            Ends(self._on_departed, self._on_stays),
        )
        self._evacuation = Evacuation(presence.peers)
        self._live: dict[RequestId, Live] = {}
        self.waits = Waits()
        self._in_action: frozenset[RequestId] = frozenset()
        self._is_prefilling = False
        self._known = Known(engine, scheduler)
        self._to_release: set[RequestId] = set()  # ended while part of the running action
        self._to_submit: dict[RequestId, Request] = {}  # a next attempt, behind that release
        self._is_draining = False

    def __len__(self) -> int:
        """Those that have not ended here."""
        return len(self._live) + len(self._to_submit)

    def drain(self) -> None:
        """Take nothing new from here on, and have what is here go on elsewhere."""
        self._is_draining = True
        self._evacuation.begin()

    def forget_model(self, model: ModelId) -> None:
        """`model` is served here no more."""
        if all(live.request.model != model for live in self._live.values()):
            self.waits.forget(model)

    # Messages

    def submit(self, request: Request, now: float) -> None:
        """Take a request in, or tell its proxy why not; a newer attempt replaces an older one."""
        live, held = self._live.get(request.id), self._to_submit.get(request.id)
        known = held if live is None else live.request
        if known is not None and known.attempt >= request.attempt:
            return  # told twice, or late
        self._end(request.id, now)
        self._to_submit.pop(request.id, None)
        if self._is_draining:
            message = f"{self._record.id} is stopping; send the request elsewhere"
            self._post_failure(request, Draining.code, message)
        elif self._is_held(request.id):
            self._to_submit[request.id] = request
        else:
            self._admit(request, now)

    def cancel(self, cancel: Cancel, now: float) -> None:
        """End a request in whatever state; one that has gone elsewhere ends there."""
        waiting = self._to_submit.get(cancel.request_id)
        if waiting is not None and cancel.covers(waiting.attempt):
            del self._to_submit[waiting.id]
        live = self._live.get(cancel.request_id)
        if live is None:
            self._arrivals.cancel(cancel)
            self.departures.forward_cancel(cancel)
        elif cancel.covers(live.request.attempt):
            self._end(cancel.request_id, now)

    def confirm(self, confirm: Confirm) -> None:
        """Tell a proxy which of its attempts are not here; others may have them, or nobody."""
        message = f"{self._record.id} does not have the request; send it again"
        for request_id, attempt in confirm.attempts:
            live, held = self._live.get(request_id), self._to_submit.get(request_id)
            known = held if live is None else live.request
            if known is None or known.attempt < attempt:
                reply = RequestFailed(request_id, attempt, Forgotten.code, message, self._record.id)
                self._outbox.post(confirm.reply_to, reply)

    def on_transfer(self, transfer: Transfer, now: float) -> None:
        """Answer the sender, whatever happens: it keeps the KV until it knows."""
        arrivals = self._arrivals
        if arrivals.is_coming(transfer):
            return  # told twice
        if arrivals.was_taken(transfer):
            answer: Accepted | Declined | None = arrivals.accepted(transfer)
        elif (error := self._objection(transfer, now)) is not None:
            answer = arrivals.declined(transfer, error)
        else:
            answer = arrivals.take(transfer, now)
            self._welcome(transfer.request, answer, now)
        if answer is not None:
            self._outbox.post(transfer.sender, answer)

    def take_arrived(self, now: float) -> None:
        """Take in requests whose KV has come from another node, or has not."""
        for pull in self._arrivals.arrived():
            error = self._objection(pull.transfer, now)
            answer = self._arrivals.settle(pull, error, now)
            self._welcome(pull.transfer.request, answer, now)
            self._outbox.post(pull.transfer.sender, answer)

    def _objection(self, transfer: Transfer, now: float) -> AegaeonError | None:
        """Why the request cannot come here now, if so; an older attempt of it ends."""
        request = transfer.request
        known = self._live.get(request.id)
        if known is not None and known.request.attempt >= request.attempt:
            return InvalidRequest(f"attempt {known.request.attempt} is here; this one is over")
        if self._is_draining:
            return Draining(f"{self._record.id} is stopping; offer it to another instance")
        self._end(request.id, now)
        if self._is_held(request.id):
            return Overloaded("an earlier attempt is still ending here; offer it again")
        return None

    def _welcome(self, request: Request, answer: Accepted | Declined | None, now: float) -> None:
        """It has just been taken in, if that is the answer: its proxy is told."""
        if isinstance(answer, Accepted):
            self._live[request.id] = Live(request, self.waits.adopt(request, now))
            moved = Moved(request.id, request.attempt, self._record.id, self._record.incarnation)
            self._outbox.post(request.reply_to, moved)

    def _admit(self, request: Request, now: float) -> None:
        """Make engine and scheduler know `request`, both or neither."""
        try:
            # The scheduler first: it knows which models are served and what is too much.
            self._scheduler.submit(request, now)
            self._engine.submit(request)
        except AegaeonError as error:
            self._scheduler.cancel(request.id, now)
            self._post_failure(request, error.code, str(error))
            return
        self._live[request.id] = Live(request, self.waits.enter(request, now))
        self._known.note(request.id, now)

    def look_up(self, now: float) -> None:
        """Tell the scheduler, now and then, how much of those that wait need not be run."""
        self._known.look_up(
            (
                request_id
                for request_id, live in self._live.items()
                if live.wait.state is not State.AT_WORK and request_id not in self._in_action
            ),
            now,
        )

    def _is_held(self, request_id: RequestId) -> bool:
        """Whether the engine still has an attempt that has ended."""
        return request_id in self._to_release or request_id in self.departures

    def admit_held(self, now: float) -> None:
        """Admit next attempts that nothing stands in the way of any more."""
        for request in tuple(self._to_submit.values()):
            if not self._is_held(request.id):
                del self._to_submit[request.id]
                self._admit(request, now)

    # Actions

    def begin(self, action: ComputeAction, now: float) -> None:
        """The compute lane works on `action` from here on."""
        self.waits.begin(action, now)
        if isinstance(action, Prefill | Decode):
            self._in_action = frozenset(action.requests)
        self._is_prefilling = isinstance(action, Prefill)
        if isinstance(action, Prefill):
            self._note(action.requests, State.AT_WORK, now)

    def end_action(self) -> None:
        """The compute lane has ended its action: what ended meanwhile is released now, before the
        scheduler hears of it; next attempts that waited for this come behind it."""
        self._in_action = frozenset()
        if self._is_prefilling:
            self._known.expire()
        for request_id in self._to_release:
            self._engine.release(request_id)
        self._to_release.clear()

    def on_stepped(self, outcome: Stepped, now: float) -> None:
        """Send the tokens of a step, with what was told of prompts before, and the failures."""
        for scores in outcome.scores:
            live = self._live.get(scores.request_id)
            if live is not None:
                self._outbox.post(live.request.reply_to, scores)
        for token in outcome.tokens:
            self._on_token(token, now)
        self._note(outcome.preempted, State.PUT_BACK, now)
        for request_id, code, message in outcome.failed:
            self._fail(request_id, code, message, now)

    def on_load_failed(self, outcome: LoadFailed, now: float) -> None:
        """Fail the model's requests, but not those whose computing here is over."""
        log.error("load failed model=%s error=%s", outcome.model, outcome.message)
        for request_id, live in tuple(self._live.items()):
            if live.request.model == outcome.model and not live.is_leaving:
                self._fail(request_id, outcome.code, outcome.message, now)

    def model_of(self, request_id: RequestId) -> ModelId | None:
        """Return the model of a request that has not ended here."""
        live = self._live.get(request_id)
        return None if live is None else live.request.model

    def set_apart(self, request_id: RequestId) -> None:
        """A prefilled request will `leave`."""
        if request_id in self._live:
            self._engine.set_apart(request_id)

    def part(self, leaving: Collection[ModelId], now: float) -> list[RequestId]:
        """Compute no more what is to go on elsewhere, with somebody there for it: all once this
        instance drains, else what is of the models that are `leaving`. Return those that run, which
        then `leave`; what has no KV is sent there by its proxy. The compute lane is free."""
        parted: list[RequestId] = []
        lives = ((request_id, live.request.model) for request_id, live in self._live.items())
        going = self._evacuation.due(lives, self._scheduler.standing_of, leaving, now)
        for request_id, has_kv in going:
            if not has_kv:
                message = f"{self._record.id} lets it go; send the request elsewhere"
                self._fail(request_id, Draining.code, message, now)
                continue
            self._scheduler.part(request_id)
            self._engine.set_apart(request_id)
            self._live[request_id].may_stay = True
            parted.append(request_id)
        return parted

    def leave(self, request_id: RequestId, now: float) -> None:
        """Let a request that is computed no more go on elsewhere."""
        live = self._live.get(request_id)
        if live is None:
            return  # abandoned while it was prefilled
        live.is_leaving = True
        going = live.so_far(self.waits.waited(live.wait, now))
        hand_over = partial(self._engine.hand_over, request_id)
        self.departures.begin(going, hand_over, live.may_stay)

    def _note(self, requests: Iterable[RequestId], state: State, now: float) -> None:
        for request_id in requests:
            live = self._live.get(request_id)
            if live is not None:
                self.waits.note(live.wait, state, now)

    def _on_token(self, token: NewToken, now: float) -> None:
        live = self._live.get(token.request_id)
        if live is None:
            return  # cancelled while it was made
        request = live.request
        waited = self.waits.news(live.wait, token.finish_reason is not None, now)
        self._outbox.post(request.reply_to, live.take(token, self._record.id, waited))
        if token.finish_reason is not None:
            del self._live[request.id]
            self._engine.release(request.id)

    # Ends

    def end_overdue(self, now: float) -> None:
        """Fail the requests whose deadline has passed, and those that the scheduler gives up."""
        for request_id, code, message in self._scheduler.given_up():
            self._fail(request_id, code, message, now)
        for request_id in self._scheduler.expired(now):
            message = "the request's deadline passed; raise --request-timeout-s or ask for less"
            self._fail(request_id, DeadlineExceeded.code, message, now)

    def abandon(self, now: float) -> None:
        """Tell the proxies of all requests that this instance stops before they have ended.

        One that another instance has just taken goes on there: its proxy knows.
        """
        lives, self._live = self._live, {}
        held, self._to_submit = self._to_submit, {}
        for live in lives.values():
            if not live.is_leaving:
                self._scheduler.cancel(live.request.id, now)
        message = f"{self._record.id} stopped before the request ended; send it again"
        for request in (*(live.request for live in lives.values()), *held.values()):
            self._post_failure(request, Draining.code, message)

    def send(self, now: float) -> None:
        """Send the replies, then offer those requests elsewhere whose tokens have all left."""
        gone = self._outbox.flush(now)
        if self.departures.advance(now):
            gone += self._outbox.flush(now)
        for address in gone:
            self._cancel_all_for(address, now)
            self.departures.on_gone(address, now)

    def _cancel_all_for(self, address: str, now: float) -> None:
        """Nobody listens at `address` any more."""
        for request in tuple(self._to_submit.values()):
            if request.reply_to == address:
                del self._to_submit[request.id]
        for request_id, live in tuple(self._live.items()):
            if live.request.reply_to == address:
                self._end(request_id, now)

    def _end(self, request_id: RequestId, now: float) -> None:
        """Forget a request in whatever state; its KV is free now, or with the running action, or
        when it is certain that nobody has taken it."""
        live = self._live.pop(request_id, None)
        if live is None:
            return
        if live.is_leaving:
            self.departures.cancel(request_id, now)
            return
        self._scheduler.cancel(request_id, now)
        if request_id in self._in_action:
            self._to_release.add(request_id)
        else:
            self._engine.release(request_id)

    def _on_departed(self, request: Request, failure: Failure | None, now: float) -> None:
        live = self._live.get(request.id)
        if live is not None and live.is_leaving:  # else it had ended here before
            del self._live[request.id]
            if failure is not None:
                self._post_failure(request, *failure)
        self._scheduler.cancel(request.id, now)
        self._engine.release(request.id)
        self.admit_held(now)

    def _on_stays(self, request: Request, now: float) -> None:
        """Nobody takes it: it goes on here, unless it has ended meanwhile."""
        if (live := self._live.get(request.id)) is None:
            self._on_departed(request, None, now)
            return
        live.is_leaving = live.may_stay = False
        self._evacuation.note_stay(request.id, now)
        self._scheduler.cancel(request.id, now)
        if self._engine.resume(request.id):
            self._scheduler.adopt(request, now, is_back=True)
        else:
            message = f"the KV of {request.id} is not here any more; send it again"
            self._fail(request.id, Draining.code, message, now)

    def _fail(self, request_id: RequestId, code: str, message: str, now: float) -> None:
        live = self._live.get(request_id)
        if live is None:
            return
        self._end(request_id, now)
        self._post_failure(live.request, code, message)

    def _post_failure(self, request: Request, code: str, message: str) -> None:
        log.info("request failed request=%s code=%s message=%s", request.id, code, message)
        reply = RequestFailed(request.id, request.attempt, code, message, self._record.id)
        self._outbox.post(request.reply_to, reply)
