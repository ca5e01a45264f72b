"""What has become of loads: preloads, and the waits after failures and losses.

What is loaded next and whom it displaces is a policy's choice.
"""

from collections.abc import Iterable, Mapping
from typing import TypeVar

from aegaeon.errors import BudgetTooSmall
from aegaeon.scheduler.groups import Group
from aegaeon.scheduler.residency import Residency
from aegaeon.types import Failure, Load, Loaded, ModelId

GroupT = TypeVar("GroupT", bound=Group)

MAX_LOSSES = 12  # of a model's weights in a row without a token: about half a minute


class Loads:
    """Keeps the preloads and the waits of a scheduler's groups."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._preload: list[ModelId] = []
        self._has_retries = False  # ever since something failed
        self.has_displaced = False  # the load under way, or the last one, evicted others

    @property
    def preloading(self) -> tuple[ModelId, ...]:
        """Models still to be loaded when there is nothing else to load."""
        return tuple(self._preload)

    def preload(self, models: Iterable[ModelId]) -> None:
        """Load `models` when the copy lane has nothing else to do and there is free room."""
        self._preload.extend(model for model in models if model not in self._preload)

    def forget(self, model: ModelId) -> None:
        """Preload `model` no more."""
        self._drop_preload(model)

    def next_preload(self) -> ModelId | None:
        """The next model to preload that fits without evicting anyone."""
        while self._preload:
            model = self._preload[0]
            fits = self._residency.plan(model, ()) is not None
            if fits and not self._residency.is_resident(model):
                return model
            self._preload.pop(0)
        return None

    def begin(self, load: Load) -> None:
        """`load` begins."""
        self._residency.begin_load(load.model, load.evict)
        self.has_displaced = bool(load.evict)

    def loaded(self, group: Group, outcome: Loaded) -> bool:
        """The load has ended well; return whether weights came that were not there."""
        has_come = self._residency.end_load(outcome.weight_bytes)
        if has_come:
            group.load_retry.reset()
            group.load_s = outcome.took_s
            group.has_gained = False
            self._drop_preload(outcome.model)
        return has_come

    def failed(self, group: Group, now: float) -> None:
        """The load has failed, sooner or later; the next try waits, longer each time."""
        if self._residency.loading == group.model:
            self._residency.end_load(None)
        group.load_retry.fail(now)
        self._has_retries = True
        self._drop_preload(group.model)

    def lost(self, group: Group, now: float, worth_s: float) -> list[Failure]:
        """Others took the room of the weights; return whom to give up because that goes on so.

        Whoever gained something from its load yields for `worth_s`: if both asked for the room
        again at once, neither would compute.
        """
        self._has_retries = True
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

    def next_retry_s(self, active: Mapping[ModelId, GroupT], now: float) -> float | None:
        """When one of `active` may be loaded again after a failure or a loss."""
        if not self._has_retries:
            return None
        retries = (group.load_at_s for group in active.values())
        return min((at for at in retries if at > now), default=None)

    def _drop_preload(self, model: ModelId) -> None:
        self._preload = [other for other in self._preload if other != model]
