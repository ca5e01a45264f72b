"""Weights of a device that computes on the node's cache itself: a switch moves no bytes."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

from aegaeon.errors import WeightsEvicted
from aegaeon.memory.host_model import HostModel, await_stages
from aegaeon.memory.source import WeightSource
from aegaeon.memory.weights import BroughtIn, Build, ResidentModel, Weights
from aegaeon.models.weights import PackedWeights
from aegaeon.types import ModelId

# Between two of these the cache need not be told again that a model is in use.
NOTE_S = 1.0


@dataclass(slots=True)
class _Held:
    host: HostModel
    resident: ResidentModel
    noted_s: float = 0.0

    def note_use(self) -> None:
        """Tell the cache that the model is used, which makes its eviction dearer."""
        now = time.monotonic()
        if now - self.noted_s >= NOTE_S:
            self.noted_s = now
            self.host.memory.note_use()


class InPlaceWeights(Weights):
    """A model is here while the cache has it, and pinned only during a use: so another instance's
    model may take its room between two of them, and then a use raises WeightsEvicted."""

    def __init__(self, source: WeightSource, build: Build) -> None:
        """Take over `source`."""
        self._source = source
        self._build = build
        self._models: dict[ModelId, _Held] = {}
        self._lock = threading.Lock()  # a model is pinned or let go, never both at once

    @property
    def used_bytes(self) -> int:
        return self._source.used_bytes

    @property
    def budget_bytes(self) -> int:
        return self._source.budget_bytes

    def bring_in(self, model: ModelId, evict: Iterable[ModelId]) -> BroughtIn:
        for victim in evict:
            # It stays where it is until its room is needed; only we no longer ask for it.
            self._source.yield_room(victim)
        held = self._models.get(model)
        if (
            held is not None
            and held.host.is_present
            and self._source.is_current(model, held.host.plan)
        ):
            self._source.want_room(model)
            return BroughtIn(held.host.plan.total_bytes)
        host = self._source.open(model)
        try:
            weights = PackedWeights(host.memory, host.plan, host)
            fresh = _Held(host, self._build(model, weights))
        except BaseException:
            host.close()
            raise
        self.drop(model)
        self._models[model] = fresh
        return BroughtIn(host.plan.total_bytes, self._find_evicted(model))

    def await_rest(self, model: ModelId, may_begin: Callable[[], bool]) -> bool:
        held = self._models.get(model)
        return held is not None and await_stages(held.host, may_begin)

    def use(self, model: ModelId) -> AbstractContextManager[ResidentModel]:
        return self._use(model)

    def drop(self, model: ModelId) -> None:
        with self._lock:
            held = self._models.pop(model, None)
        if held is not None:
            held.host.close()

    def set_demand(self, model: ModelId, is_wanted: bool) -> None:
        self._source.set_demand(model, is_wanted)

    def close(self) -> None:
        for model in tuple(self._models):
            self.drop(model)
        self._source.close()

    @contextmanager
    def _use(self, model: ModelId) -> Iterator[ResidentModel]:
        with ExitStack() as pinned:
            with self._lock:
                held = self._models.get(model)
                if held is None:
                    raise WeightsEvicted(f"the weights of {model} are not here; load them")
                pinned.enter_context(held.host.pinned())
            held.note_use()
            yield held.resident

    def _find_evicted(self, but: ModelId) -> tuple[ModelId, ...]:
        """Let go of the models that lost their room, to whomever; of `but` its next use tells."""
        others = tuple((m, held) for m, held in tuple(self._models.items()) if m != but)
        gone = tuple(m for m, held in others if not held.host.is_present)
        for model in gone:
            self.drop(model)
        return gone
