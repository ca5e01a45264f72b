"""When there will be room again: what stands before those that wait, in the time it takes.

A prediction, not a schedule: requests begin in the order in which they came, each behind its
model's load and its prefill, while those that run decode at the pace that is promised, or as fast
as they can while nobody may begin. Pure; who asks knows the requests and the time.
"""

import bisect
import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from aegaeon.scheduler.cost import Costs, ModelCost
from aegaeon.types import ModelId

# What decoding leaves to prefills at the least, where it would take all time.
LEAST_LEFT = 0.1
LONGEST_S = 120  # that clients wait; above it they give up at once
MOST_PROMISED = 4096
KEPT_S = 2.0  # before somebody comes: longer ones leave more places empty, and few come for nothing
GRACE_S = 0.5  # and behind that


class Ahead(NamedTuple):
    """A request at an instance: what is left to do for it, as far as is known."""

    key: str
    model: ModelId
    prompt_tokens: int
    left_tokens: float  # to make, about
    has_begun: bool


class Site(NamedTuple):
    """An instance: its requests, in the order in which they came, the models whose weights are
    there, and what steps really take there, over what they would by the costs."""

    requests: Sequence[Ahead]
    resident: frozenset[ModelId]
    pace: float = 1.0


class Event(NamedTuple):
    """A request of `key` for `model` begins, or ends, so many seconds from now."""

    after_s: float
    key: str
    model: ModelId


class Forecast(NamedTuple):
    """What will make room, the first first: requests that begin wait no more, and those that end
    hold their prompts no more."""

    begins: tuple[Event, ...]
    ends: tuple[Event, ...]


class Pace(NamedTuple):
    """What is known of the devices: costs by model, sequences of a model in a step, those that may
    run, and the time between tokens that is promised."""

    costs: Costs
    max_batch: int
    max_running: int
    tbt_s: float


def forecast(sites: Sequence[Site], pace: Pace, most: int) -> Forecast:
    """Return when up to `most` of the requests at each of `sites` begin, and when those end that
    do so meanwhile."""
    begins: list[Event] = []
    ends: list[Event] = []
    for site in sites:
        device = _Device(site, pace)
        device.run(most)
        begins += device.begins
        ends += device.ends
    return Forecast(tuple(sorted(begins)), tuple(sorted(ends)))


class Line:
    """Those who were refused and told when to come again: the next one is told a later time.

    Places are kept for those who are to come soon, so that nobody comes in between: else it would
    be whoever has just been served. Who it was that was told is not known; others seldom come in
    just that moment.
    """

    def __init__(self) -> None:
        self._promised: list[float] = []  # when to come, the first first

    def promise(self, free_s: Sequence[float], free: int, now: float) -> float:
        """Return how long to wait for room of which pieces come free at `free_s`, in order, where
        `free` are free now. At least a second, in whole ones, as HTTP has it."""
        self._forget(now)
        coming = [at_s for at_s in free_s if at_s > now]
        place = max(0, len(self._promised) - free)
        if place < len(coming):
            at_s = coming[place]
        elif coming:
            # Beyond what was looked at it goes on as it went.
            at_s = coming[-1] + (coming[-1] - now) / len(coming) * (place + 1 - len(coming))
        else:
            at_s = now + place + 1.0
        wait_s = float(min(max(1, math.ceil(at_s - now)), LONGEST_S))
        if len(self._promised) < MOST_PROMISED:
            bisect.insort(self._promised, now + wait_s)
        return wait_s

    def kept(self, now: float) -> int:
        """Return for how many who come soon there must be room."""
        self._forget(now)
        return bisect.bisect_right(self._promised, now + KEPT_S)

    def redeem(self, now: float) -> bool:
        """Whether somebody was told to come now; nobody else was, from here on."""
        self._forget(now)
        if not self._promised or self._promised[0] > now:
            return False
        del self._promised[0]
        return True

    def is_over(self, now: float) -> bool:
        """Whether nobody comes any more."""
        self._forget(now)
        return not self._promised

    def _forget(self, now: float) -> None:
        """Whoever has not come by now does not."""
        del self._promised[: bisect.bisect_left(self._promised, now - GRACE_S)]


@dataclass(slots=True)
class _Running:
    """Of one model: who runs, as a heap of (round in which it ends, key), and their context."""

    ends_at: list[tuple[float, str]] = field(default_factory=list)
    context_tokens: int = 0


class _Device:
    """One site, from now on."""

    def __init__(self, site: Site, pace: Pace) -> None:
        self._site = site
        self._pace = pace
        self._costs: Mapping[ModelId, ModelCost] = pace.costs.models
        self._running: dict[ModelId, _Running] = {}
        self._there = set(site.resident)
        self._now = 0.0
        self._rounds = 0.0  # each gives every running request a token
        self.begins: list[Event] = []
        self.ends: list[Event] = []

    def run(self, most: int) -> None:
        """Let the requests begin, up to `most`, then as many end in all."""
        known = [one for one in self._site.requests if one.model in self._costs]
        for one in known:
            if one.has_begun:
                self._begin(one)
        for one in [one for one in known if not one.has_begun][:most]:
            while self._count(one.model) >= self._pace.max_running:
                self._decode(self._next_end(one.model))
            self._bring(one)
            self._begin(one)
            self.begins.append(Event(self._now, one.key, one.model))
        while len(self.ends) < most and any(one.ends_at for one in self._running.values()):
            self._decode(min(self._next_end(m) for m, r in self._running.items() if r.ends_at))

    def _bring(self, one: Ahead) -> None:
        """Load its model, if that is not there, and prefill it; others decode as promised."""
        cost, pace = self._costs[one.model], self._pace
        round_s = self._round_s()
        if one.model not in self._there:
            self._there.add(one.model)
            self._pass(pace.costs.load_s(cost), max(round_s, pace.tbt_s))
        left = max(LEAST_LEFT, 1.0 - round_s / pace.tbt_s)
        took_s = cost.prefill_s(one.prompt_tokens) * self._site.pace / left
        self._pass(took_s, max(round_s, pace.tbt_s))

    def _begin(self, one: Ahead) -> None:
        running = self._running.setdefault(one.model, _Running())
        heapq.heappush(running.ends_at, (self._rounds + max(1.0, one.left_tokens), one.key))
        running.context_tokens += one.prompt_tokens

    def _count(self, model: ModelId) -> int:
        running = self._running.get(model)
        return 0 if running is None else len(running.ends_at)

    def _next_end(self, model: ModelId) -> float:
        return self._running[model].ends_at[0][0]

    def _round_s(self) -> float:
        """The time in which every running request gets a token."""
        total_s = 0.0
        for model, running in self._running.items():
            count = len(running.ends_at)
            if count:
                batches = math.ceil(count / self._pace.max_batch)
                step_s = self._costs[model].decode_s(
                    running.context_tokens // batches, min(count, self._pace.max_batch)
                )
                total_s += batches * step_s
        return total_s * self._site.pace

    def _pass(self, seconds: float, round_s: float) -> None:
        """Let `seconds` go by, with a token for every running request each `round_s`."""
        began_s, rounds = self._now, self._rounds
        self._now += seconds
        if round_s > 0.0:
            self._rounds += seconds / round_s
        self._drop_ended(lambda at: began_s + (at - rounds) * round_s)

    def _decode(self, until: float) -> None:
        """Do nothing but decode until round number `until`."""
        round_s, began_s, rounds = self._round_s(), self._now, self._rounds
        self._now += max(0.0, until - rounds) * round_s
        self._rounds = max(rounds, until)
        self._drop_ended(lambda at: began_s + max(0.0, at - rounds) * round_s)

    def _drop_ended(self, when: Callable[[float], float]) -> None:
        for model, running in self._running.items():
            while running.ends_at and running.ends_at[0][0] <= self._rounds:
                count = len(running.ends_at)
                at, key = heapq.heappop(running.ends_at)
                running.context_tokens -= running.context_tokens // count
                self.ends.append(Event(when(at), key, model))
