"""Which model is loaded next and whom it may displace; whose turn it is stands elsewhere."""

from collections.abc import Iterable, Mapping

from aegaeon.errors import BudgetTooSmall
from aegaeon.scheduler.groups import Group
from aegaeon.scheduler.residency import Residency
from aegaeon.types import Failure, Loaded, ModelId

MAX_LOSSES = 12  # of a model's weights in a row without a token: about half a minute


class Loads:
    """Chooses loads for a scheduler's groups; keeps the preloads and the waits after failures."""

    def __init__(self, residency: Residency, groups: Mapping[ModelId, Group]) -> None:
        self._residency = residency
        self._groups = groups
        self._displaces = False  # the load under way evicted others
        self._preload: list[ModelId] = []

    @property
    def preloading(self) -> tuple[ModelId, ...]:
        """Models still to be loaded when there is nothing else to load."""
        return tuple(self._preload)

    def preload(self, models: Iterable[ModelId]) -> None:
        """Load `models` when the copy lane has nothing else to do and there is free room."""
        self._preload.extend(models)

    def head(self, runnable: Mapping[ModelId, Group], now: float) -> Group | None:
        """The first group in line whose model is neither resident nor waits after a failure."""
        absent = (
            group
            for model, group in runnable.items()
            if not self._residency.is_resident(model) and group.load_at_s <= now
        )
        return min(absent, key=lambda group: group.ticket, default=None)

    def victims(
        self, head: Group, runnable: Mapping[ModelId, Group], kept: set[ModelId]
    ) -> tuple[ModelId, ...] | None:
        """Whom to evict so that `head` fits, none of `kept`; None when there is no way.

        The idle go first, least recently used first; then those behind `head` in line, the last
        first. Those before it stay until they had their turn.
        """
        idle: list[ModelId] = []
        later: list[Group] = []
        for model in self._residency.resident:
            group = self._groups[model]
            if model in kept:
                continue
            if model not in runnable:
                idle.append(model)
            elif group.ticket > head.ticket:
                later.append(group)
        later.sort(key=lambda group: -group.ticket)
        return self._residency.plan(head.model, idle + [group.model for group in later])

    def next_preload(self) -> ModelId | None:
        """The next model to preload that fits without evicting anyone."""
        while self._preload:
            model = self._preload[0]
            fits = self._residency.plan(model, ()) is not None
            if fits and not self._residency.is_resident(model):
                return model
            self._preload.pop(0)
        return None

    def begin(self, model: ModelId, victims: tuple[ModelId, ...]) -> None:
        """The load of `model` begins, with `victims` evicted."""
        self._residency.begin_load(model, victims)
        self._displaces = bool(victims)

    def loaded(self, outcome: Loaded) -> None:
        """The load has ended well; a turn that displaced others is to be worth it."""
        group = self._groups[outcome.model]
        self._residency.end_load(outcome.weight_bytes)
        group.load_retry.reset()
        group.load_s = outcome.took_s
        group.has_gained = False
        if self._displaces or group.loss_retry.failures:
            group.unpaid_load_s = outcome.took_s
        self._drop_preload(outcome.model)

    def failed(self, group: Group, now: float) -> None:
        """The load has failed, sooner or later; the next try waits, longer each time."""
        if self._residency.loading == group.model:
            self._residency.end_load(None)
        group.load_retry.fail(now)
        self._drop_preload(group.model)

    def lost(self, group: Group, now: float, worth_s: float) -> list[Failure]:
        """Others took the room of the weights; return whom to give up because that goes on so.

        Whoever gained something from its load yields for `worth_s`: if both asked for the room
        again at once, neither would compute.
        """
        group.loss_retry.fail(now, worth_s if group.has_gained else 0.0)
        if group.loss_retry.failures < MAX_LOSSES:
            return []
        group.loss_retry.reset()
        self.failed(group, now)
        message = (
            f"other instances took the room of {group.model} again and again before it computed; "
            "raise --model-cache-budget-gb"
        )
        return [(r, BudgetTooSmall.code, message) for r in (*group.waiting, *group.running)]

    def next_retry_s(self, now: float) -> float | None:
        """When a model with requests may be tried again after a failure or a loss."""
        retries = (g.load_at_s for g in self._groups.values() if g.waiting or g.running)
        return min((at for at in retries if at > now), default=None)

    def _drop_preload(self, model: ModelId) -> None:
        self._preload = [other for other in self._preload if other != model]
