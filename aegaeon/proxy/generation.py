"""One generation as the gateway sees it: what was asked, what came back, where it runs.

A plain state machine: no I/O, and time comes from outside. One event loop owns it.
"""

import asyncio
from collections.abc import Callable

import msgspec

from aegaeon.errors import AegaeonError, HandoffLost, InstanceLost
from aegaeon.proxy.outbox import Target
from aegaeon.types import (
    FinishReason,
    InstanceId,
    ModelId,
    Moved,
    Request,
    RequestFailed,
    RequestId,
    SamplingParams,
    TokenEvent,
)

# A request that took this many instances down with it is not tried on another one.
MAX_LOSSES = 3
_WAIT_S = 1.0
# Failures that mean "not here": the request goes elsewhere.
_ELSEWHERE = frozenset({"draining", "instance_lost"})


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """What to generate. `max_tokens` must fit into the model's context behind the prompt; an `id`
    that is given is nobody else's."""

    model: ModelId
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    stop_token_ids: tuple[int, ...] = ()
    id: RequestId = ""


class Delta(msgspec.Struct, frozen=True):
    """New tokens. `received_s` is when the last of them reached this process (monotonic clock);
    with finish reason `stop` the last id is the stop token."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    instance: InstanceId
    received_s: float


class OpenRequest:
    """A generation in flight. Tokens that came twice or from an earlier attempt are dropped, so
    what `take` hands out is each token once, in order."""

    def __init__(
        self, request_id: RequestId, generation: Generation, arrival_s: float, deadline_s: float
    ) -> None:
        self.id = request_id
        self.generation = generation
        self.arrival_s = arrival_s
        self.deadline_s = deadline_s
        self.target: Target | None = None
        # The sending under way, whose outcome says which instance must hear of a cancel.
        self.placing: asyncio.Future[Target | None] | None = None
        self.refused: set[Target] = set()
        self.error: AegaeonError | None = None
        # Told of more tokens, instead of those who `wait`, who then hear of all else.
        self.on_tokens: Callable[[], None] | None = None
        self._attempt = 0
        self._refused_attempt: int | None = None  # by an instance not known yet
        self._losses = 0
        self._tokens: list[int] = []
        self._taken = 0
        self._finish: FinishReason | None = None
        self._instance: InstanceId = ""
        self._received_s = arrival_s
        self._changed = asyncio.Event()

    @property
    def is_over(self) -> bool:
        """All tokens have come."""
        return self._finish is not None

    @property
    def has_ended(self) -> bool:
        """Nothing more will come: it is over or has failed."""
        return self.is_over or self.error is not None

    @property
    def attempt(self) -> int:
        """How often the request has been placed anew."""
        return self._attempt

    def next_request(self, reply_to: str) -> Request:
        """Return the message for the present attempt: it goes on behind the tokens so far."""
        asked = self.generation
        return Request(
            id=self.id,
            model=asked.model,
            prompt_token_ids=asked.prompt_token_ids,
            sampling=asked.sampling,
            max_tokens=asked.max_tokens,
            stop_token_ids=asked.stop_token_ids,
            reply_to=reply_to,
            arrival_s=self.arrival_s,
            deadline_s=self.deadline_s,
            generated_token_ids=tuple(self._tokens),
            attempt=self._attempt,
        )

    def placed(self, target: Target, attempt: int) -> bool:
        """Note where `attempt` went; False when that was over, or moved on, before we knew."""
        self.placing = None
        if attempt == self._refused_attempt:
            self.refused.add(target)
        if attempt != self._attempt or self.target is not None:
            return False
        self.target = target
        return True

    def is_moved_by(self, moved: Moved) -> bool:
        """Whether `moved` is about the present attempt, and so says where it lives."""
        return moved.attempt == self._attempt and not self.has_ended

    def take_in(self, reply: TokenEvent | RequestFailed, received_s: float) -> bool:
        """Take an instance's word in; True when the request no longer runs at its instance."""
        if reply.attempt != self._attempt or self.has_ended:
            return False
        match reply:
            case TokenEvent():
                self._take_tokens(reply, received_s)
                if self.on_tokens is not None:
                    self.on_tokens()
                    if not self.is_over and reply.attempt == self._attempt:
                        return False
            case RequestFailed(instance=instance) if self._lives_elsewhere(instance):
                return False  # it has moved on; whoever has it speaks for it
            case RequestFailed(code=HandoffLost.code):
                self.lose()
            case RequestFailed(code=code) if code in _ELSEWHERE:
                if self.target is not None:
                    self.refused.add(self.target)
                else:
                    self._refused_attempt = self._attempt
                self._attempt += 1
            case RequestFailed(code=code, message=message):
                self.error = error_of(code, message)
        self._changed.set()
        return self.has_ended or reply.attempt != self._attempt

    def lose(self) -> None:
        """The instance is gone: the next attempt goes on from here, unless there were too many."""
        self._attempt += 1
        self._losses += 1
        if self._losses >= MAX_LOSSES:
            self.fail(InstanceLost(f"{self._losses} instances ended while serving this request"))
        self._changed.set()

    def fail(self, error: AegaeonError) -> None:
        """End the request with `error`, unless it has ended already."""
        if not self.has_ended:
            self.error = error
        self._changed.set()

    def take(self) -> Delta | None:
        """Return the tokens that have come since the last call, or None when there are none."""
        if self._taken == len(self._tokens) and self._finish is None:
            return None
        new = tuple(self._tokens[self._taken :])
        self._taken = len(self._tokens)
        return Delta(new, self._finish, self._instance, self._received_s)

    async def wait(self) -> None:
        """Return when something may have changed, at the latest after a second."""
        # Not `wait_for`: this runs once a token, and a timer is cheaper than a task.
        timer = asyncio.get_running_loop().call_later(_WAIT_S, self._changed.set)
        try:
            await self._changed.wait()
        finally:
            timer.cancel()
        self._changed.clear()

    def _lives_elsewhere(self, instance: InstanceId) -> bool:
        return self.target is not None and self.target.instance != instance

    def _take_tokens(self, event: TokenEvent, received_s: float) -> None:
        known = len(self._tokens) - event.position
        if known < 0:
            # A record was lost on the way: only a new attempt can fill the gap.
            self.lose()
            return
        self._tokens.extend(event.token_ids[known:])
        self._finish = event.finish_reason
        self._instance = event.instance
        self._received_s = received_s


def error_of(code: str, message: str) -> AegaeonError:
    """Return the error that an instance reported, as the class that has this code."""
    kinds: list[type[AegaeonError]] = [AegaeonError]
    for kind in kinds:
        if kind.code == code:
            return kind(message)
        kinds.extend(kind.__subclasses__())
    return AegaeonError(f"{code}: {message}")
