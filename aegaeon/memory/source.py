"""Opens models in the node's weight cache for one engine, and says what it wants kept there."""

import logging
import threading
import time

from aegaeon._native import WeightCache
from aegaeon.errors import CheckpointError, LoadStalled, WeightsEvicted
from aegaeon.memory.evictions import EvictionLog
from aegaeon.memory.host_model import HostModel, Reading
from aegaeon.memory.spare import SpareKeeper
from aegaeon.models.checkpoint import plan_load
from aegaeon.models.packing import Layout, PackPlan, plan_pack
from aegaeon.types import ModelId, ModelSpec

log = logging.getLogger(__name__)

# How long a load waits for others to let go of room in the cache.
ROOM_S = 30.0


class WeightSource:
    """Opens models in the node's cache. Owned by one engine; verbs may be called by any thread."""

    def __init__(
        self,
        cache: WeightCache,
        specs: tuple[ModelSpec, ...],
        reading: Reading,
        layout: Layout = "tiles",
    ) -> None:
        """Matrices lie in the cache as `layout` says."""
        self._cache = cache
        self.evictions = EvictionLog(cache)
        self._reading = reading
        self._layout: Layout = layout
        self._plans = {spec.id: _Planned(spec, layout) for spec in specs}
        self._coming: dict[ModelId, HostModel] = {}  # stalled, to be waited for again
        self._lock = threading.Lock()
        self._mapped: dict[ModelId, HostModel] = {}  # taken back whole, and nobody's now
        self._idle_s: dict[ModelId, float] = {}  # to leave the cache when unused for so long
        self._spare = SpareKeeper(cache, specs, self._tidy)

    @property
    def used_bytes(self) -> int:
        """Bytes of all models in the cache, whoever loaded them."""
        return self._cache.used_bytes

    @property
    def budget_bytes(self) -> int:
        """The most that it holds."""
        return self._cache.budget_bytes

    def put(self, spec: ModelSpec) -> None:
        """Let `spec` be opened, too. Raises CheckpointError, UnsupportedModel."""
        planned = _Planned(spec, self._layout)
        planned.current()
        self._plans[spec.id] = planned
        self._spare.put(spec)

    def take(self, model: ModelId) -> None:
        """Forget a model that nobody has open."""
        planned = self._plans.pop(model, None)
        if planned is not None and planned.key is not None:
            self._cache.set_demand(planned.key, False)
        self._spare.take(model)
        for left in (self._coming.pop(model, None), self._take_mapped(model)):
            if left is not None:
                left.close()

    def let_go(self, model: ModelId, idle_s: float) -> None:
        """Have the cache drop a model that nobody has open here, where no process wants it or has
        used it for `idle_s`. Soon, and by another thread: somebody may hold the cache's lock."""
        mapped = self._take_mapped(model)
        if mapped is not None:
            mapped.close()
        self._idle_s[model] = idle_s
        self._spare.look_soon()

    def open(self, model: ModelId) -> HostModel:
        """Return the model when its first stages are in. Raises BudgetTooSmall when others pin all
        room, CheckpointError, UnsupportedModel, and LoadStalled: what was begun goes on then."""
        planned = self._plans[model]
        plan, key = self._current(planned, model)
        self._cache.set_demand(key, planned.is_wanted)
        mapped = self._take_mapped(model)
        if mapped is not None:
            if mapped.plan is plan and mapped.is_present:
                mapped.memory.note_use()
                return mapped
            mapped.close()
        give_up_s = time.monotonic() + ROOM_S
        while True:
            host = self._coming.pop(model, None)
            if host is not None and host.plan is not plan:
                host.close()
                host = None
            if host is None:
                left_s = max(0.0, give_up_s - time.monotonic())
                cached = self._cache.acquire(key, model, plan.total_bytes, plan.stages, left_s)
                if cached.is_loader:
                    self._spare.gather(cached)
                host = HostModel(model, plan, cached, self._reading)
            try:
                host.await_first()
                self.evictions.write()
                return host
            except LoadStalled:
                self._coming[model] = host
                raise
            except WeightsEvicted:
                # Its loader gave up, or it went again before we looked.
                host.close()
                if time.monotonic() >= give_up_s:
                    raise
            except BaseException:
                host.close()
                raise

    def take_back(self, host: HostModel) -> None:
        """Let go of a model. One that is whole stays mapped until it is opened again: that saves
        the system 0.2 s for each GB, and keeps nobody from evicting it."""
        before = self._take_mapped(host.model)
        if before is not None:
            before.close()
        if host.is_whole and host.is_present:
            with self._lock:
                self._mapped[host.model] = host
        else:
            host.close()

    def is_current(self, model: ModelId, plan: PackPlan) -> bool:
        """Whether the files of `model` are still those that `plan` was made of."""
        return self._current(self._plans[model], model)[0] is plan

    def set_demand(self, model: ModelId, is_wanted: bool) -> None:
        """Say that requests for `model` wait or run here, which makes its eviction dearer."""
        planned = self._plans[model]
        planned.is_wanted = is_wanted or planned.is_pinned
        if planned.key is not None:
            self._cache.set_demand(planned.key, planned.is_wanted)

    def want_room(self, model: ModelId) -> None:
        """Take back what `yield_room` said, now that the model is used again."""
        planned = self._plans[model]
        if planned.key is not None:
            self._cache.set_demand(planned.key, planned.is_wanted)

    def yield_room(self, model: ModelId) -> None:
        """Let others have the model's room until it is opened again, wanted or not."""
        key = self._plans[model].key
        if key is not None:
            self._cache.set_demand(key, False)

    def close(self) -> None:
        """Let go of the cache; what it holds stays for others."""
        self._spare.stop()
        while self._coming:
            self._coming.popitem()[1].close()
        for model in self._plans:
            mapped = self._take_mapped(model)
            if mapped is not None:
                mapped.close()
        self._cache.close()
        self._spare.join()

    def _current(self, planned: "_Planned", model: ModelId) -> tuple[PackPlan, bytes]:
        """Return plan and key of the files as they are now, or, where those are gone, as they were
        when the cache read what it still holds. Raises CheckpointError when it holds nothing."""
        try:
            return planned.current()
        except CheckpointError as error:
            before = planned.before
            if before is None or not self._holds(model):
                raise
            log.warning("serving from the cache alone model=%s error=%s", model, error)
            return before

    def _holds(self, model: ModelId) -> bool:
        """Whether the cache has the whole model. Asked first, so that no other is evicted for one
        that cannot be loaded."""
        entries = self._cache.status()
        return any(entry.model == model and entry.state == "ready" for entry in entries)

    def _tidy(self) -> None:
        """Let go of what others have evicted: pages that are locked stay until then. Also see what
        is held at all, on this thread, for which nobody waits."""
        for model in tuple(self._idle_s):
            self._drop_idle(model, self._idle_s.pop(model))
        self.evictions.look()
        if self._reading.locks is None:
            return
        for model, host in tuple(self._mapped.items()):
            if host.is_present:
                continue
            with self._lock:
                if self._mapped.get(model) is not host:
                    continue
                del self._mapped[model]
            host.close()

    def _drop_idle(self, model: ModelId, idle_s: float) -> None:
        planned = self._plans.get(model)
        if planned is None or planned.key is None or planned.is_wanted:
            return
        for entry in self._cache.status():
            is_idle = entry.idle_s >= idle_s and not entry.demand_pids
            if entry.model == model and is_idle and self._cache.evict(planned.key):
                self.evictions.write()
                self.evictions.forget()
                return

    def _take_mapped(self, model: ModelId) -> HostModel | None:
        with self._lock:
            return self._mapped.pop(model, None)


class _Planned:
    """A model's plan, made when first needed and again when its files have changed."""

    def __init__(self, spec: ModelSpec, layout: Layout) -> None:
        self._path, self._quantize, self._layout = spec.path, spec.quantize, layout
        self._plan: PackPlan | None = None
        self.key: bytes | None = None
        self.is_pinned = self.is_wanted = spec.is_pinned

    @property
    def before(self) -> tuple[PackPlan, bytes] | None:
        """The plan and its key as `current` returned them last."""
        return None if self._plan is None or self.key is None else (self._plan, self.key)

    def current(self) -> tuple[PackPlan, bytes]:
        """Return the plan and its key, both of the files as they are now. Raises CheckpointError,
        UnsupportedModel."""
        before = self.before
        if before is not None and before[0].is_current():
            return before
        plan = plan_pack(plan_load(self._path), self._quantize, self._layout)
        self._plan, self.key = plan, plan.digest()
        return plan, self.key
