"""The models of an instance: those that the domain's catalogue has on its node, while it serves.

Owned by the runtime. One that cannot be served here is refused, and others see why. One that moves
to another node takes no new requests here at once, and goes when the last has ended.
"""

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import msgspec

from aegaeon.config import Settings
from aegaeon.engine.base import Engine
from aegaeon.errors import AegaeonError, StoreUnavailable
from aegaeon.instance.costs import costs_of, speed_of
from aegaeon.instance.idle import IdleModels
from aegaeon.instance.launch import Launch
from aegaeon.instance.presence import Presence
from aegaeon.logs import set_level
from aegaeon.measures import Speed
from aegaeon.metrics import Target
from aegaeon.scheduler.cost import ModelCost
from aegaeon.scheduler.learning import LearningCosts
from aegaeon.scheduler.policies import AnyScheduler
from aegaeon.scheduler.residency import Residency
from aegaeon.specs import REFUSALS_BYTES, Bounds, Catalog
from aegaeon.store.catalog import CatalogView
from aegaeon.types import ModelId, ModelSpec

log = logging.getLogger(__name__)

LOOK_S = 0.1  # between two looks at the catalogue
SEE_LOG = "see the server's log"  # for why so many were refused


@dataclass(frozen=True, slots=True)
class Deciding:
    """What decides with models, and must know them."""

    scheduler: AnyScheduler
    residency: Residency
    learning: LearningCosts


class Served:
    """What is served here, kept as the catalogue says."""

    def __init__(
        self,
        launch: Launch,
        catalog: CatalogView,
        engine: Engine,
        presence: Presence,
        deciding: Deciding,
    ) -> None:
        """All of `launch` are served already."""
        self._settings = launch.settings
        self._node = launch.node
        self._store = catalog
        self._engine = engine
        self._presence = presence
        self._deciding = deciding
        self._specs = {spec.id: spec for spec in launch.specs}
        self._wanted = dict(self._specs)
        self._bounds: Bounds | None = None  # as the settings say
        self._version = launch.catalog
        self._seen: Catalog | None = None  # not all of which is followed yet
        self._last = Catalog(version=launch.catalog)
        self._refused: dict[ModelId, tuple[ModelSpec, str]] = {}
        self._elsewhere: frozenset[ModelId] = frozenset()  # models that live on other nodes only
        self._leaving: frozenset[ModelId] = frozenset()  # of these, those that still are here
        self._look_s = float("-inf")
        self._speeds: dict[ModelId, tuple[ModelCost, Speed]] = {}  # and of what costs they are
        self._idle = IdleModels(engine, deciding.scheduler, presence)

    @property
    def version(self) -> int:
        """That of the catalogue which is served, but for what is refused."""
        return self._version

    @property
    def refused(self) -> dict[ModelId, str]:
        """Models that cannot be served here, or not as wanted, and why, as far as there is room to
        tell."""
        told, left = {}, REFUSALS_BYTES
        for model, (_, why) in self._refused.items():
            left -= len(why.encode())
            told[model] = why if left >= 0 else SEE_LOG
        return told

    @property
    def leaving(self) -> Collection[ModelId]:
        """Models that live on other nodes only by now, and still have requests here."""
        return self._leaving

    def speeds(self, models: Iterable[ModelId]) -> dict[ModelId, Speed]:
        """Return how fast those of `models` are that are known here."""
        costs = self._deciding.learning.costs
        speeds = {}
        for model in models:
            cost = costs.models.get(model)
            if cost is None:
                continue
            known = self._speeds.get(model)
            if known is None or known[0] is not cost:
                known = self._speeds[model] = cost, speed_of(costs, cost)
            speeds[model] = known[1]
        return speeds

    def has_left(self, model: ModelId) -> bool:
        """Whether who asks for `model` is to ask on another node."""
        return model in self._elsewhere and model not in self._specs

    def preload(self, model: ModelId) -> None:
        """Bring a model in that is served, while there is free room."""
        if model in self._specs and model not in self._leaving:
            self._deciding.scheduler.preload((model,))

    def look(self, now: float, is_free: bool) -> Collection[ModelId]:
        """Follow the catalogue, at most every LOOK_S; models come and go only while no load is
        under way (`is_free`). Return those that have gone."""
        if now - self._look_s < LOOK_S:
            return ()
        self._look_s = now
        if is_free:
            self._idle.look(self._specs.values(), now)
        try:
            catalog = self._store.read()
        except (StoreUnavailable, AegaeonError) as error:
            log.warning("catalogue not readable error=%s", error)
            return ()
        if catalog.bounds is not None and catalog.bounds != self._bounds:
            self._bound(catalog.bounds)
        # Of one version there may be more models later, whose files have come.
        if catalog.version >= self._last.version and catalog != self._last:
            self._seen = self._last = catalog
            self._wanted = {spec.id: spec for spec in catalog.on(self._node)}
            known = frozenset(spec.id for spec in catalog.models)
            self._elsewhere = known - self._wanted.keys()
            if self._leave():  # who leaves may end from the next look on: nobody sends it any more
                return ()
        if not is_free or (self._seen is None and not self._leaving):
            return ()
        before = set(self._specs)
        if self._follow() and self._seen is not None:
            self._version, self._seen = self._seen.version, None
        return before.difference(self._specs)

    def _bound(self, bounds: Bounds) -> None:
        """Go by other limits and promises from here on."""
        self._bounds = bounds
        changes = msgspec.structs.asdict(bounds)
        self._settings = msgspec.structs.replace(self._settings, **changes)
        set_level(bounds.log_level)
        scheduler = self._deciding.scheduler
        scheduler.bound(bounds.max_waiting, self._settings.running)
        for spec in self._specs.values():
            promise_of(scheduler, spec, self._settings)
        log.info("bounds changed")

    def _follow(self) -> bool:
        """Serve what is wanted; say whether that is done, but for what has requests that are to
        end here before it leaves."""
        before = self._told()
        gone = [model for model in self._specs if model not in self._wanted]
        left = [model for model in gone if not self._end(model)]
        self._leaving &= self._specs.keys()
        for spec in self._wanted.values():
            self._serve(spec)
        # What is asked for no more is refused no more.
        wanted = self._wanted
        self._refused = {m: no for m, no in self._refused.items() if wanted.get(m) == no[0]}
        if self._told() != before:
            self._presence.serve(self._told())
        return self._leaving.issuperset(left)

    def _leave(self) -> bool:
        """Take nothing new of what lives on other nodes only; say whether that is news."""
        before, self._leaving = self._leaving, self._elsewhere & self._specs.keys()
        if self._leaving != before:
            self._presence.serve(self._told())
        return not self._leaving <= before

    def _told(self) -> tuple[ModelId, ...]:
        """What others are told that is served here."""
        return tuple(model for model in self._specs if model not in self._leaving)

    def _serve(self, spec: ModelSpec) -> None:
        known = self._specs.get(spec.id)
        if known == spec or self._refused.get(spec.id, (None,))[0] == spec:
            return
        try:
            if known is None:
                self._begin(spec)
            scheduler, residency = self._deciding.scheduler, self._deciding.residency
            settle_model(scheduler, residency, spec, self._settings)
        except AegaeonError as error:
            log.error("model refused model=%s error=%s", spec.id, error)
            self._refused[spec.id] = (spec, str(error))
            if known is None:
                self._end(spec.id)
            return
        self._specs[spec.id] = spec

    def _begin(self, spec: ModelSpec) -> None:
        self._engine.begin_model(spec)
        budget_bytes = self._engine.usage().weight_budget_bytes
        costs, measured = costs_of(self._settings, (spec,), budget_bytes)
        learning = self._deciding.learning
        learning.enter(spec.id, costs.models[spec.id], spec.id in measured)
        self._deciding.scheduler.begin_model(spec.id, spec.weight_bytes)
        log.info("model added model=%s bytes=%d", spec.id, spec.weight_bytes)

    def _end(self, model: ModelId) -> bool:
        """Forget a model; False while it has requests here."""
        if not self._deciding.scheduler.end_model(model):
            return False
        self._engine.end_model(model)
        self._deciding.learning.leave(model)
        self._speeds.pop(model, None)
        if self._specs.pop(model, None) is not None:
            log.info("model removed model=%s", model)
        return True


def settle_model(
    scheduler: AnyScheduler, residency: Residency, spec: ModelSpec, settings: Settings
) -> None:
    """Promise, rank and pin as the spec says. Raises BudgetTooSmall."""
    promise_of(scheduler, spec, settings)
    scheduler.prioritise(spec.id, spec.priority)
    if not spec.is_pinned:
        residency.unpin(spec.id)
    elif not residency.is_pinned(spec.id):
        residency.pin(spec.id)
        scheduler.preload((spec.id,))


def promise_of(scheduler: AnyScheduler, spec: ModelSpec, settings: Settings) -> None:
    """Promise what the spec says, or else the settings."""
    ttft_s, tbt_s = spec.slo_ttft_s or settings.slo_ttft_s, spec.slo_tbt_s or settings.slo_tbt_s
    scheduler.promise(spec.id, Target(ttft_s, tbt_s))
