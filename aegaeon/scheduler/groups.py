"""A model's requests as the scheduler sees them: who waits, runs or leaves, and its KV.

No decisions are made here.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from aegaeon.scheduler.cost import ModelCost
from aegaeon.scheduler.retries import Retry
from aegaeon.types import ModelId, RequestId

# Of a request: it waits; does so with a piece of its prompt run; runs; is on its way elsewhere.
Standing = Literal["waiting", "begun", "running", "leaving"]


@dataclass(slots=True, eq=False)
class Entry:
    """A request at one device. Times are seconds of the clock that the scheduler is told."""

    id: RequestId
    arrival_s: float
    tokens: int  # while it waits, those of which a prefill makes the KV; else those that it holds
    made: int = 0  # tokens since it came
    first_s: float = 0.0  # when the first of them was there
    is_here: bool = True  # its KV is on the device, or it has none
    # First tokens, while it waits, that need not be run: whose KV others have left, as it looks, or
    # a piece of its prefill has made.
    known: int = 0

    def prefill_s(self, cost: ModelCost, known: int | None = None) -> float:
        """How long its prefill takes behind the tokens that are known, or that were."""
        known = self.known if known is None else known
        if not known:
            return cost.prefill_s(self.tokens)
        return cost.prefill_s(self.tokens - known, self.tokens**2 - known**2)

    def due_s(self, tbt_s: float) -> float:
        """When its next token is, at that pace."""
        return self.first_s + self.made * tbt_s


@dataclass(slots=True, eq=False)
class Group:
    """The requests of one model."""

    model: ModelId
    # first come, first served, pre-empted ones in front
    waiting: OrderedDict[RequestId, Entry] = field(default_factory=OrderedDict)
    # of these, those with a piece of their prefill behind them; they hold KV for the whole of it
    begun: dict[RequestId, Entry] = field(default_factory=dict)
    # the front has decoded least recently
    running: dict[RequestId, Entry] = field(default_factory=dict)
    # prefilled ones on their way to another instance; they hold KV until they are gone
    leaving: dict[RequestId, Entry] = field(default_factory=dict)
    here_tokens: int = 0  # whose KV is on the device
    away: int = 0  # those with KV whose KV is not
    load_retry: Retry = field(default_factory=lambda: Retry(1.0, 30.0))  # after a failed load
    loss_retry: Retry = field(default_factory=lambda: Retry(0.1, 4.0, free=1))  # lost, no token yet
    load_s: float = 0.0  # what the last load took
    has_gained: bool = False  # a token since then
    # Set while waiting requests lack KV: no prefill until `kv_freed` or, where nobody here holds
    # any, `kv_retry`.
    kv_ticket: int | None = None
    kv_freed: bool = False
    kv_retry: Retry = field(default_factory=lambda: Retry(0.05, 1.0))

    @property
    def has_requests(self) -> bool:
        """Whether anything waits or runs here."""
        return bool(self.waiting or self.running)

    @property
    def holders(self) -> tuple[Entry, ...]:
        """Those with KV that are not leaving, here or away."""
        return (*self.running.values(), *self.begun.values())

    def holder(self, request: RequestId) -> Entry | None:
        """Return `request` if it is one of them."""
        return self.running.get(request) or self.begun.get(request)

    @property
    def to_prefill(self) -> int:
        """Tokens that those that wait have to run."""
        return sum(entry.tokens - entry.known for entry in self.waiting.values())

    @property
    def load_at_s(self) -> float:
        """No load before this."""
        return max(self.load_retry.at_s, self.loss_retry.at_s)

    def pick_prefill(self, max_requests: int, max_tokens: int) -> tuple[RequestId, ...]:
        """The first waiting requests within both bounds, at least one."""
        picked: list[RequestId] = []
        tokens = 0
        for request, entry in self.waiting.items():
            tokens += entry.tokens
            if picked and (len(picked) >= max_requests or tokens > max_tokens):
                break
            picked.append(request)
        return tuple(picked)

    def pick_decode(self, max_batch: int) -> tuple[RequestId, ...]:
        """The running requests that have waited longest for their next token; those whose KV is
        away do not count."""
        if not self.away:
            if len(self.running) <= max_batch:
                return tuple(self.running)
            return tuple(
                request for request, _ in zip(self.running, range(max_batch), strict=False)
            )
        here = [request for request, entry in self.running.items() if entry.is_here]
        return tuple(here[:max_batch])

    def rotate(self, requests: Iterable[RequestId]) -> None:
        """Put the running ones of `requests` behind those that did not decode."""
        for request in requests:
            entry = self.running.pop(request, None)
            if entry is not None:
                self.running[request] = entry

    def begin_running(self, request: RequestId, now: float) -> Entry:
        """A waiting request has been prefilled and has a token more."""
        entry = self.waiting.pop(request)
        self.begun.pop(request, None)
        self.running[request] = entry
        entry.is_here = True
        entry.tokens += 1
        if not entry.made:
            entry.first_s = now
        entry.made += 1
        return entry

    def put_back(self, requests: Iterable[RequestId]) -> tuple[Entry, ...]:
        """Return `requests` to the front of those waiting; say which of them had KV."""
        held: list[Entry] = []
        for request in reversed(tuple(requests)):
            entry = self.running.pop(request, None) or self.begun.pop(request, None)
            if entry is not None:
                held.append(entry)
                entry.known = 0
                self.away -= not entry.is_here
                self.waiting[request] = entry
            if request in self.waiting:
                self.waiting.move_to_end(request, last=False)
        return tuple(held)

    def standing_of(self, request: RequestId) -> Standing | None:
        """Return how `request` stands; None: it is not here."""
        if request in self.begun:
            return "begun"
        if request in self.waiting:
            return "waiting"
        if request in self.running:
            return "running"
        return "leaving" if request in self.leaving else None

    def leave(self, request: RequestId) -> None:
        """Let a running request go to another instance."""
        self.leaving[request] = self.running.pop(request)

    def remove(self, request: RequestId) -> Entry | None:
        """Forget `request`; return it if it had KV."""
        self.waiting.pop(request, None)
        entry = (
            self.leaving.pop(request, None)
            or self.running.pop(request, None)
            or self.begun.pop(request, None)
        )
        if entry is not None:
            self.away -= not entry.is_here
        return entry


@dataclass(frozen=True, slots=True)
class Counts:
    """How many requests of each model wait, and run or leave, where there are any; and the tokens
    that wait for a prefill, of each model that has a group. Nobody changes them."""

    waiting: dict[ModelId, int]
    running: dict[ModelId, int]
    to_prefill: dict[ModelId, int]


def counts_of(groups: Mapping[ModelId, Group]) -> Counts:
    """Count all of them. It takes a look at each request that waits."""
    # Of hundreds of models few are asked for at a time.
    some = [g for g in groups.values() if g.waiting or g.running or g.leaving]
    running = {g.model: len(g.running) + len(g.leaving) for g in some}
    to_prefill = dict.fromkeys(groups, 0)
    to_prefill.update((g.model, g.to_prefill) for g in some if g.waiting)
    return Counts(
        waiting={g.model: len(g.waiting) for g in some if g.waiting},
        running={model: count for model, count in running.items() if count},
        to_prefill=to_prefill,
    )
