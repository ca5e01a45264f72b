"""Weights of a device with memory of its own: copied from the node's cache into its arena.

The copies run beside compute: of a model that comes in, each layer is used as soon as it is there.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

from aegaeon._native import CopyEngine
from aegaeon.errors import BudgetTooSmall, WeightsEvicted
from aegaeon.memory.arena import Arena, Compaction, Place
from aegaeon.memory.arrival import Arrival
from aegaeon.memory.host_model import FIRST_STAGES, await_stages
from aegaeon.memory.source import WeightSource
from aegaeon.memory.traffic import Traffic
from aegaeon.memory.weights import BroughtIn, Build, ResidentModel, Weights
from aegaeon.models.weights import PackedWeights
from aegaeon.types import ModelId

log = logging.getLogger(__name__)

# How long a load waits for the model that computes to end its step and let itself be moved.
PLACE_S = 30.0
LOOK_S = 0.005
LONGEST_PAUSE_S = 0.5  # between tries of a load
MOVE_S = 60.0


@dataclass(slots=True, eq=False)
class _Held:
    """A model in the arena. `lock` is held by whoever uses or moves it. What has been moved is
    resident (None) at its next use: to record a step anew takes milliseconds that others would
    wait for."""

    arrival: Arrival
    place: Place
    resident: ResidentModel | None
    lock: threading.Lock = field(default_factory=threading.Lock)


class StagedWeights(Weights):
    """A model is here from `bring_in` to `drop`. Nobody else takes its room."""

    def __init__(
        self,
        source: WeightSource,
        arena: Arena,
        copier: CopyEngine,
        build: Build,
        traffic: Traffic,
    ) -> None:
        """Take over `source`; what the copies come to is counted in `traffic`."""
        self._source = source
        self._arena = arena
        self._copier = copier
        self._build = build
        self._traffic = traffic
        self._models: dict[ModelId, _Held] = {}
        # Over `_models` and `_arena`; taken inside a model's own lock, which inside this one is
        # only tried.
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        return self._arena.used_bytes

    @property
    def budget_bytes(self) -> int:
        return self._arena.capacity_bytes

    def bring_in(self, model: ModelId, evict: Iterable[ModelId]) -> BroughtIn:
        for victim in evict:
            self.drop(victim)
        held = self._models.get(model)
        if held is not None:
            if not held.arrival.is_lost and self._source.is_current(model, held.arrival.plan):
                return BroughtIn(_size(held.place))
            self.drop(model)
        give_up_s = time.monotonic() + PLACE_S
        pause_s = LOOK_S
        while True:
            try:
                return self._bring_in(model)
            except WeightsEvicted:
                # Another instance took the room in the cache before the copy began, or the copy
                # failed; which may be over soon, or last.
                if time.monotonic() + pause_s >= give_up_s:
                    raise
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _bring_in(self, model: ModelId) -> BroughtIn:
        host = self._source.open(model)
        try:
            place = self._make_place(model, host.plan.total_bytes)
        except BaseException:
            host.close()
            raise
        target = self._arena.address + place.offset
        arrival = Arrival(host, target, self._copier, self._traffic, self._source.take_back)
        try:
            # While the first bytes come.
            held = _Held(arrival, place, self._view(model, place, arrival))
            arrival.await_stage(FIRST_STAGES - 1)
        except BaseException:
            arrival.close()
            with self._lock:
                self._arena.free(model)
            raise
        with self._lock:
            self._models[model] = held
        return BroughtIn(_size(place))

    def await_rest(self, model: ModelId, may_begin: Callable[[], bool]) -> bool:
        held = self._models.get(model)
        return held is not None and await_stages(held.arrival, may_begin)

    def use(self, model: ModelId) -> AbstractContextManager[ResidentModel]:
        return self._use(model)

    def drop(self, model: ModelId) -> None:
        held = self._models.get(model)
        if held is None:
            return
        with held.lock:
            if self._models.get(model) is held:
                held.arrival.close()
                with self._lock:
                    self._forget(model)

    def set_demand(self, model: ModelId, is_wanted: bool) -> None:
        self._source.set_demand(model, is_wanted)

    def close(self) -> None:
        for model in tuple(self._models):
            self.drop(model)
        self._source.close()

    @contextmanager
    def _use(self, model: ModelId) -> Iterator[ResidentModel]:
        held = self._models.get(model)
        if held is None:
            raise WeightsEvicted(f"the weights of {model} are not on the device; load them")
        with held.lock:
            if self._models.get(model) is not held:
                raise WeightsEvicted(f"the weights of {model} have left the device; load them")
            held.arrival.hurry()
            if held.resident is None:
                held.resident = self._view(model, held.place, held.arrival)
            yield held.resident

    def _forget(self, model: ModelId) -> None:
        del self._models[model]
        self._arena.free(model)

    def _view(self, model: ModelId, place: Place, arrival: Arrival) -> ResidentModel:
        memory = self._arena.bytes_of(place)
        return self._build(model, PackedWeights(memory, arrival.plan, arrival))

    # Room

    def _make_place(self, model: ModelId, size_bytes: int) -> Place:
        """Find room, moving models where it takes that; those in use are moved after their step."""
        give_up_s = time.monotonic() + PLACE_S
        while True:
            with self._lock:
                place = self._arena.allocate(model, size_bytes)
                if place is None and self._compact(size_bytes):
                    continue
                free_bytes = self._arena.capacity_bytes - self._arena.used_bytes
            if place is not None:
                return place
            if size_bytes > free_bytes or time.monotonic() >= give_up_s:
                raise BudgetTooSmall(
                    f"{model} has {size_bytes} bytes of weights, the device has {free_bytes} free "
                    f"bytes, {self._arena.largest_gap_bytes} of them in a row; raise "
                    "--device-memory-gb"
                )
            time.sleep(LOOK_S)

    def _compact(self, size_bytes: int) -> bool:
        """Try to join gaps to `size_bytes`; say whether that was done. `_lock` is held."""
        held = {n: h for n, h in self._models.items() if h.lock.acquire(blocking=False)}
        try:
            movable = {name for name, one in held.items() if one.arrival.is_complete}
            # One that just comes in is not among the models yet.
            everyone = {place.model for place in self._arena.places()}
            compaction = self._arena.plan_compaction(size_bytes, everyone - movable)
            if compaction is None:
                return False
            self._move(compaction)
            return True
        finally:
            for one in held.values():
                one.lock.release()

    def _move(self, compaction: Compaction) -> None:
        ticket = self._copier.submit(self._arena.segments(compaction.moves))
        if not ticket.wait(timeout_s=MOVE_S):
            ticket.cancel()
            # What was to be moved is neither here nor there.
            for move in compaction.moves:
                self._forget(move.model)
            raise BudgetTooSmall(
                f"the device's arena could not be compacted ({ticket.failure or 'in time'}); "
                "load the models again"
            )
        self._arena.commit(compaction)
        for move in compaction.moves:
            self._enter(move.model)
        log.info("arena compacted bytes=%d", compaction.size_bytes)

    def _enter(self, model: ModelId) -> None:
        """Note where `model` was moved."""
        place = self._arena.get(model)
        assert place is not None, model
        held = self._models[model]
        held.place, held.resident = place, None


def _size(place: Place) -> int:
    return place.end - place.offset
