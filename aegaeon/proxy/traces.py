"""What a traced request went through: noted while it is served, cut into phases when it is over.

Numbers and names only, none of a client's text. What makes spans of it is in `spans`.
"""

import time
from typing import NamedTuple

from aegaeon.measures import NOT_WAITED, Waited
from aegaeon.proxy.openai import Body, ChatBody
from aegaeon.types import InstanceId, ModelId, TokenEvent

MAX_MARKS = 256  # of a generation; later waits go into the last one
MAX_RUNS = 64  # generations of a request; of more there are no spans

Value = str | int | float | bool | list[str]


class Mark(NamedTuple):
    """An instance told with tokens what had been waited for by then. They came at `at_s`, the one
    before them at `before_s`, as number `tokens`."""

    at_s: float
    before_s: float
    tokens: int
    waited: Waited
    instance: InstanceId


class Phase(NamedTuple):
    """What a generation was at from one second of the monotonic clock to another."""

    name: str  # queue, load, switch, prefill, decode, preempted
    start_s: float
    end_s: float
    instance: InstanceId
    tokens: int = 0  # that were made


class Run:
    """One generation of a request."""

    def __init__(self, model: ModelId, prompt_tokens: int, arrival_s: float) -> None:
        self.model = model
        self.prompt_tokens = prompt_tokens
        self.arrival_s = arrival_s
        self.cached_tokens = 0
        self.tokens = 0
        self.attempts = 1
        self.first_s = self.last_s = self.end_s = arrival_s
        self.finish_reason: str | None = None
        self.error: str | None = None  # its code
        self.marks: list[Mark] = []

    def heard(self, event: TokenEvent, before_s: float, tokens: int, at_s: float) -> None:
        """An event came with what was waited for, when there were `tokens`, the last of them of
        `before_s`."""
        assert event.waited is not None
        if len(self.marks) >= MAX_MARKS:
            self.marks.pop()
        self.marks.append(Mark(at_s, before_s, tokens, event.waited, event.instance))
        self.attempts = event.attempt + 1

    @property
    def instances(self) -> list[InstanceId]:
        """Where it has been, in order."""
        return list(dict.fromkeys(mark.instance for mark in self.marks))

    def phases(self) -> list[Phase]:
        """Return what it went through. Of what was waited for before a token only the sums are
        known, so each kind of it stands there as one."""
        if not self.tokens:
            return [Phase("queue", self.arrival_s, self.end_s, "")]
        found: list[Phase] = []
        before, turn_s, turn_tokens, instance = NOT_WAITED, self.first_s, 1, ""
        for mark in self.marks:
            gap, before = _between(before, mark.waited), mark.waited
            if mark.tokens:
                if not any(seconds > 0 for _, seconds in gap):
                    instance = mark.instance
                    continue
                made = mark.tokens - turn_tokens
                found.append(Phase("decode", turn_s, mark.before_s, instance, made))
            spent, turn_s = _laid_out(gap, mark)
            found += spent
            if not mark.tokens:
                found.append(Phase("prefill", turn_s, mark.at_s, mark.instance, 1))
                turn_s = mark.at_s
            turn_tokens, instance = max(1, mark.tokens), mark.instance
        if self.tokens > turn_tokens:
            made = self.tokens - turn_tokens
            found.append(Phase("decode", turn_s, self.last_s, instance, made))
        return found


def _between(before: Waited, now: Waited) -> tuple[tuple[str, float], ...]:
    """Return the seconds of each kind that came to `before`, in the order they mostly have."""
    load_s = now.load_s - before.load_s
    return (
        ("queue", now.queue_s - before.queue_s),
        ("preempted", now.preempted_s - before.preempted_s),
        ("load", load_s),
        ("switch", now.switch_s - before.switch_s - load_s),
    )


def _laid_out(gap: tuple[tuple[str, float], ...], mark: Mark) -> tuple[list[Phase], float]:
    """Return the waits before a mark one after another, and when the last one ends."""
    found, at_s = [], mark.before_s
    for name, seconds in gap:
        end_s = min(at_s + seconds, mark.at_s)
        if end_s > at_s:
            found.append(Phase(name, at_s, end_s, mark.instance))
            at_s = end_s
    return found, at_s


class Trace:
    """One HTTP request that is traced. Owned by the event loop until it is over."""

    def __init__(self, method: str, route: str, traceparent: str, tracestate: str) -> None:
        self.method = method
        self.route = route
        self.traceparent = traceparent  # as the client sent them, not checked yet
        self.tracestate = tracestate
        self.began_s = self.ended_s = time.monotonic()
        self.epoch_ns = time.time_ns() - round(self.began_s * 1e9)  # of the monotonic clock
        self.status = 0  # of the answer; 0: it was never begun
        self.request_id = ""
        self.model: ModelId = ""
        self.asked: dict[str, Value] = {}
        self.prompt_tokens = 0
        self.runs: list[Run] = []
        self.left_out = 0  # runs beyond MAX_RUNS

    def asks(
        self, asked: dict[str, Value], answer_id: str, model: ModelId, prompt_tokens: int
    ) -> None:
        """The body was read and found good; `asked` is `asked_of` it, `model` is what answers."""
        self.model, self.prompt_tokens = model, prompt_tokens
        self.asked = asked | {
            "gen_ai.response.id": answer_id,
            "gen_ai.response.model": model,
        }

    def run(self, model: ModelId, prompt_tokens: int, arrival_s: float) -> Run | None:
        """A generation begins; None where it is one of too many."""
        if len(self.runs) >= MAX_RUNS:
            self.left_out += 1
            return None
        self.runs.append(Run(model, prompt_tokens, arrival_s))
        return self.runs[-1]

    def at_ns(self, at_s: float) -> int:
        """Return a time of the monotonic clock as nanoseconds since 1970."""
        return self.epoch_ns + round(at_s * 1e9)


def asked_of(body: Body) -> dict[str, Value]:
    """Return what was asked for, by the names of OpenTelemetry's conventions for generative AI;
    stop strings are text and not among it."""
    is_chat = isinstance(body, ChatBody)
    most = getattr(body, "max_completion_tokens", None) or body.max_tokens
    given: dict[str, Value | None] = {
        "gen_ai.operation.name": "chat" if is_chat else "text_completion",
        "gen_ai.provider.name": "aegaeon",
        "gen_ai.request.model": body.model,
        "gen_ai.request.stream": True if body.stream else None,
        "gen_ai.request.max_tokens": most,
        "gen_ai.request.temperature": body.temperature,
        "gen_ai.request.top_p": body.top_p,
        "gen_ai.request.top_k": body.top_k,
        "gen_ai.request.seed": body.seed,
        "gen_ai.request.frequency_penalty": body.frequency_penalty,
        "gen_ai.request.presence_penalty": body.presence_penalty,
        "gen_ai.request.choice.count": body.n if body.n != 1 else None,
    }
    if isinstance(body, ChatBody) and body.response_format is not None:
        kind = body.response_format.type
        given["gen_ai.output.type"] = "text" if kind == "text" else "json"
    return {name: value for name, value in given.items() if value is not None}
