"""A model's requests as the scheduler sees them: who waits, runs or leaves, its place in line.

No decisions are made here.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from aegaeon.scheduler.retries import Retry
from aegaeon.types import ModelId, RequestId


@dataclass(slots=True)
class Group:
    """The requests of one model. Groups with work stand in line by `ticket`, lowest first."""

    model: ModelId
    ticket: int = 0
    # request -> tokens a prefill must run; first come, first served, pre-empted ones in front
    waiting: OrderedDict[RequestId, int] = field(default_factory=OrderedDict)
    # request -> tokens it holds; the front has decoded least recently
    running: OrderedDict[RequestId, int] = field(default_factory=OrderedDict)
    # prefilled ones on their way to another instance; they hold KV until they are gone
    leaving: set[RequestId] = field(default_factory=set)
    has_prefilled: bool = False  # the last step of this group was a prefill
    load_retry: Retry = field(default_factory=lambda: Retry(1.0, 30.0))  # after a failed load
    loss_retry: Retry = field(default_factory=lambda: Retry(0.1, 4.0, free=1))  # lost, no token yet
    load_s: float = 0.0  # what the last load took
    has_gained: bool = False  # a token since then
    unpaid_load_s: float = 0.0  # of what the next turn displaced; it is to be worth it
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
    def load_at_s(self) -> float:
        """No load before this."""
        return max(self.load_retry.at_s, self.loss_retry.at_s)

    def pick_prefill(self, max_requests: int, max_tokens: int) -> tuple[RequestId, ...]:
        """The first waiting requests within both bounds, at least one."""
        picked: list[RequestId] = []
        tokens = 0
        for request, cost in self.waiting.items():
            tokens += cost
            if picked and (len(picked) >= max_requests or tokens > max_tokens):
                break
            picked.append(request)
        return tuple(picked)

    def pick_decode(self, max_batch: int) -> tuple[RequestId, ...]:
        """The running requests that have waited longest for their next token."""
        return tuple(request for request, _ in zip(self.running, range(max_batch), strict=False))

    def rotate(self, requests: Iterable[RequestId]) -> None:
        """Put the running ones of `requests` behind those that did not decode."""
        for request in requests:
            if request in self.running:
                self.running.move_to_end(request)

    def add_token(self, request: RequestId) -> None:
        """Count a new token of a waiting or running request; it runs from now on."""
        held = self.waiting.pop(request, None)
        if held is None:
            held = self.running[request]
        self.running[request] = held + 1

    def put_back(self, requests: Iterable[RequestId]) -> bool:
        """Return `requests` to the front of those waiting; say whether one of them held KV."""
        held_kv = False
        for request in reversed(tuple(requests)):
            tokens = self.running.pop(request, None)
            if tokens is not None:
                held_kv = True
                self.waiting[request] = tokens
            if request in self.waiting:
                self.waiting.move_to_end(request, last=False)
        return held_kv

    def leave(self, request: RequestId) -> None:
        """Let a running request go to another instance."""
        del self.running[request]
        self.leaving.add(request)

    def remove(self, request: RequestId) -> bool:
        """Forget `request`; say whether it was running or leaving and so held KV."""
        self.waiting.pop(request, None)
        held_kv = request in self.leaving or request in self.running
        self.leaving.discard(request)
        self.running.pop(request, None)
        return held_kv

    def leave_kv_line(self) -> None:
        """Nothing here lacks KV."""
        self.kv_ticket = None
        self.kv_retry.reset()

    def clear(self) -> tuple[RequestId, ...]:
        """Forget and return all requests but those leaving."""
        everyone = (*self.waiting, *self.running)
        self.waiting.clear()
        self.running.clear()
        return everyone
