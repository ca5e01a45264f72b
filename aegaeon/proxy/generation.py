"""One generation as the gateway sees it: what was asked, what came back, where it runs.

A plain state machine: no I/O, and time comes from outside. One event loop owns it.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence

import msgspec

from aegaeon.deaths import Work
from aegaeon.errors import AegaeonError, Forgotten, GivenUp, HandoffLost, error_of
from aegaeon.measures import NOT_WAITED, Waited
from aegaeon.proxy.losses import Suspicion
from aegaeon.proxy.metrics import Timing
from aegaeon.proxy.outbox import Target
from aegaeon.proxy.traces import Trace
from aegaeon.sampling import PromptScores, SamplingParams, TokenLogProbs
from aegaeon.types import (
    FinishReason,
    InstanceId,
    ModelId,
    Moved,
    Request,
    RequestFailed,
    RequestId,
    TokenEvent,
)

log = logging.getLogger(__name__)

TOKEN_BYTES = 36  # of an id in a prompt: a number and the reference to it
BIAS_BYTES = 120  # of an entry of logit_bias
SCORE_BYTES = 120  # of a log-probability of a token, with its id
_WAIT_S = 1.0
# Failures that mean "not here": the request goes elsewhere.
_ELSEWHERE = frozenset({"draining", "instance_lost", Forgotten.code})


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """What to generate. `max_tokens` must fit into the model's context behind the prompt; an `id`
    that is given is nobody else's; all of a `key` share what devices give, by their weights."""

    model: ModelId
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    stop_token_ids: tuple[int, ...] = ()
    id: RequestId = ""
    key: str = ""
    weight: float = 1.0
    trace: Trace | None = None  # of the HTTP request that it is part of, where that is traced
    kept_bytes: int = 0  # of what else is kept for its answer
    is_streamed: bool = False  # what is taken of its answer is not kept

    @property
    def score_bytes(self) -> int:
        """What the log-probabilities of a token of the answer take, where they were asked for."""
        asked = self.sampling.logprobs
        return 0 if asked is None else (1 + asked) * SCORE_BYTES

    @property
    def held_bytes(self) -> int:
        """What it takes here while it is open, before any answer: the prompt, what the answer is
        held to, the prompt's log-probabilities where they are to come."""
        sampling, tokens = self.sampling, len(self.prompt_token_ids)
        scores = 0 if sampling.prompt_logprobs is None else 1 + sampling.prompt_logprobs
        return (
            tokens * (TOKEN_BYTES + scores * SCORE_BYTES)
            + len(sampling.grammar)
            + len(sampling.logit_bias) * BIAS_BYTES
            + self.kept_bytes
        )


class Delta(msgspec.Struct, frozen=True, gc=False):
    """New tokens. `received_s` is when the last of them reached this process (monotonic clock);
    with finish reason `stop` the last id is the stop token. `log_probs` are those of the tokens,
    `scores` more of those of the prompt, where they were asked for; `waited` is the last known."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    instance: InstanceId
    received_s: float
    log_probs: tuple[TokenLogProbs, ...] = ()
    scores: tuple[TokenLogProbs, ...] = ()
    waited: Waited = NOT_WAITED
    cached_tokens: int = 0


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
        self.is_stopped = False  # its text ended before its tokens did
        self.timing: Timing | None = None
        # Told of the first token, and of the end.
        self.on_begun: Callable[[], None] = nothing
        self.on_left: Callable[[], None] = nothing
        # Told how many bytes more are held for it, or fewer.
        self.on_held: Callable[[int], None] = _hold_nothing
        self.waited = NOT_WAITED
        # Told of more tokens or scores, instead of those who `wait`, who hear of all else.
        self.on_tokens: Callable[[], None] | None = None
        # Told before anything changes but by `absorb`.
        self.on_other: Callable[[], None] = nothing
        self._attempt = 0
        self._refused_attempt: int | None = None  # by an instance not known yet
        self._suspicion = Suspicion()
        self._confirmed_s = arrival_s  # when its instance was last asked whether it has it
        self._tokens: list[int] = []
        self._taken = 0
        # Of the tokens that are not taken, where they were asked for, and of the prompt but for its
        # first token.
        self._log_probs: list[TokenLogProbs] = []
        self._scores: list[TokenLogProbs] = []
        self._taken_scores = 0
        self._finish: FinishReason | None = None
        self._instance: InstanceId = ""
        self._received_s = arrival_s
        self._cached_tokens = 0
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

    @property
    def instance(self) -> InstanceId:
        """From where its last tokens came."""
        return self._instance

    @property
    def is_traced(self) -> bool:
        """Whether each wait is told to its trace."""
        return self.timing is not None and self.timing.run is not None

    @property
    def is_even(self) -> bool:
        """It is in the middle of its tokens, and all that have come have been taken."""
        is_taken = 0 < self._taken == len(self._tokens)
        return is_taken and self._taken_scores == len(self._scores) and not self.has_ended

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it has all it wanted, if so."""
        return "stop" if self.is_stopped else self._finish

    @property
    def made(self) -> int:
        """Tokens that have come."""
        return len(self._tokens)

    @property
    def has_tokens(self) -> bool:
        """Whether any has come."""
        return bool(self._tokens)

    def count_end(self, now: float) -> None:
        """Nobody waits for it any more: count what became of it."""
        if self.timing is None:
            return
        log.info(
            "request ended request=%s model=%s tokens=%d took_s=%.3f finish=%s error=%s",
            *(self.id, self.generation.model, len(self._tokens), now - self.arrival_s),
            *(self.finish_reason, self.error.code if self.error is not None else None),
        )
        waited = self.waited
        if not self._tokens and waited == NOT_WAITED:
            # Nobody has said what it waited for, and it has got nothing else.
            waited = Waited(queue_s=now - self.arrival_s)
        if self.finish_reason is not None:
            self.timing.finished(self.finish_reason, waited, now)
        elif self.error is not None:
            self.timing.failed(self.error.code, waited, now)
        else:
            self.timing.cancelled(waited, now)

    def next_request(self, reply_to: str, now: float) -> Request:
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
            waited=self._waited_by(now),
            key=asked.key,
            weight=asked.weight,
            is_suspect=self._suspicion.is_suspect,
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

    def give_up_attempt(self) -> None:
        """Nobody knows whether the present attempt was taken in: what comes of it is void."""
        self.on_other()
        self.placing = None
        self._attempt += 1

    def is_moved_by(self, moved: Moved) -> bool:
        """Whether `moved` is about the present attempt, and so says where it lives."""
        return moved.attempt == self._attempt and not self.has_ended

    def take_in(self, reply: TokenEvent | PromptScores | RequestFailed, received_s: float) -> bool:
        """Take an instance's word in; True when the request no longer runs at its instance."""
        if reply.attempt != self._attempt or self._finish is not None or self.error is not None:
            return False
        self.on_other()
        match reply:
            case TokenEvent() | PromptScores():
                if isinstance(reply, TokenEvent):
                    self._take_tokens(reply, received_s)
                else:
                    self._take_scores(reply)
                if self.on_tokens is not None:
                    self.on_tokens()
                    if self._finish is None and reply.attempt == self._attempt:
                        return False
            case RequestFailed(instance=instance) if self._lives_elsewhere(instance):
                return False  # it has moved on; whoever has it speaks for it
            case RequestFailed(code=HandoffLost.code):
                self.lose()
            case RequestFailed(code=code) if code in _ELSEWHERE:
                self._go_elsewhere(code)
            case RequestFailed(code=code, message=message):
                self.error = error_of(code, message)
        self._changed.set()
        return self.has_ended or reply.attempt != self._attempt

    def lose(self, work: Work | None = None, error: AegaeonError | None = None) -> None:
        """The instance is gone, which was at `work` (None: nobody knows): the next attempt goes on
        from here, unless too many have ended because of it, or an `error` says that it must not."""
        self.on_other()
        self._attempt += 1
        self._suspicion.note(self.id, work, len(self._tokens))
        if self._suspicion.is_certain:
            message = (
                f"{self._suspicion.losses} instances ended while they computed this request, so it "
                "is not tried again; the server's log says how they ended"
            )
            self.fail(GivenUp(message))
        if error is not None:
            self.fail(error)
        self._changed.set()

    def is_silent(self, now: float, limit_s: float) -> bool:
        """Whether nothing has been heard of it for `limit_s`, nor asked; then that is done now."""
        since_s = max(self._received_s, self._confirmed_s)
        if now - since_s < limit_s:
            return False
        self._confirmed_s = now
        return True

    def fail(self, error: AegaeonError) -> None:
        """End the request with `error`, unless it has ended already."""
        self.on_other()
        if not self.has_ended:
            self.error = error
        self._changed.set()

    def absorb(self, token_ids: Sequence[int], received_s: float) -> None:
        """Take in the next tokens of the present attempt, while it `is_even`; they are taken."""
        self._tokens.extend(token_ids)
        self._taken = len(self._tokens)
        self._received_s = received_s
        if self.timing is not None:
            self.timing.note(len(token_ids), received_s)

    def take(self) -> Delta | None:
        """Return the tokens that have come since the last call, or None when there are none."""
        is_new = self._taken < len(self._tokens) or self._taken_scores < len(self._scores)
        if not is_new and self._finish is None:
            return None
        taken, taken_scores = self._taken, self._taken_scores
        self._taken, self._taken_scores = len(self._tokens), len(self._scores)
        log_probs, self._log_probs = self._log_probs, []
        if log_probs and self.generation.is_streamed:
            self.on_held(-len(log_probs) * self.generation.score_bytes)
        return Delta(
            tuple(self._tokens[taken:]),
            self._finish,
            self._instance,
            self._received_s,
            tuple(log_probs),
            tuple(self._scores[taken_scores:]) if self._scores else (),
            self.waited,
            self._cached_tokens,
        )

    async def wait(self) -> None:
        """Return when something may have changed, at the latest after a second."""
        # Not `wait_for`: this runs once a token, and a timer is cheaper than a task.
        timer = asyncio.get_running_loop().call_later(_WAIT_S, self._changed.set)
        try:
            await self._changed.wait()
        finally:
            timer.cancel()
        self._changed.clear()

    def _waited_by(self, now: float) -> Waited:
        """What it has waited for: since its last token, if it has any, for another instance."""
        if not self._tokens:
            return self.waited
        lost_s = max(0.0, now - self._received_s)
        return msgspec.structs.replace(self.waited, preempted_s=self.waited.preempted_s + lost_s)

    def _go_elsewhere(self, code: str) -> None:
        if code == Forgotten.code:
            pass  # it can be there again
        elif self.target is not None:
            self.refused.add(self.target)
        else:
            self._refused_attempt = self._attempt
        self._attempt += 1

    def _lives_elsewhere(self, instance: InstanceId) -> bool:
        return self.target is not None and self.target.instance != instance

    def _take_scores(self, scores: PromptScores) -> None:
        # The prompt's first token has none; what an earlier attempt has told comes once more.
        known = len(self._scores) + 1 - scores.position
        if known < 0:
            self.lose()
            return
        self._scores.extend(scores.log_probs[known:])

    def _take_tokens(self, event: TokenEvent, received_s: float) -> None:
        known = len(self._tokens) - event.position
        if known < 0:
            # A record was lost on the way: only a new attempt can fill the gap.
            self.lose()
            return
        if event.position == 0:
            self._cached_tokens = event.cached_tokens
            self.on_begun()
        new = event.token_ids[known:] if known else event.token_ids
        self._tokens.extend(new)
        if event.log_probs:
            self._log_probs.extend(event.log_probs[known:])
            self.on_held(len(new) * self.generation.score_bytes)
        if event.waited is not None:
            self.waited = event.waited
            if self.timing is not None:
                self.timing.heard(event, received_s)
        if self.timing is not None and new:
            self.timing.cached_tokens = self._cached_tokens
            self.timing.note(len(new), received_s)
        self._finish = event.finish_reason
        self._instance = event.instance
        self._received_s = received_s


def nothing() -> None:
    """Nobody wants to be told."""


def _hold_nothing(_: int) -> None:
    """As `nothing`."""
