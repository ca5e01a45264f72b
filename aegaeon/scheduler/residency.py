"""Which models' weights are on the device, in bytes: what fits, and what to drop to make room.

Whose turn it is and who may not be evicted is the scheduler's decision, passed in.
"""

from collections.abc import Iterable, Mapping

from aegaeon.errors import BudgetTooSmall
from aegaeon.types import ModelId


class Residency:
    """The resident models and the one being loaded, never over the budget.

    Raises BudgetTooSmall when a model would not fit even alone.
    """

    def __init__(self, weight_bytes: Mapping[ModelId, int], budget_bytes: int) -> None:
        self._bytes = dict(weight_bytes)
        self._budget_bytes = budget_bytes
        self._used: dict[ModelId, int] = {}  # resident model -> when last used, a counter
        self._loading: ModelId | None = None
        self._uses = 0
        for model, size in self._bytes.items():
            self._check_fits(model, size)

    def _check_fits(self, model: ModelId, size: int) -> None:
        if size > self._budget_bytes:
            raise BudgetTooSmall(
                f"model {model} needs {size / 1e9:.2f} GB for its weights, the budget of an "
                f"instance is {self._budget_bytes / 1e9:.2f} GB; raise --model-cache-budget-gb"
            )

    @property
    def loading(self) -> ModelId | None:
        """The model that the copy lane brings in now."""
        return self._loading

    @property
    def resident(self) -> tuple[ModelId, ...]:
        """The resident models, the least recently used first."""
        return tuple(sorted(self._used, key=self._used.__getitem__))

    @property
    def held_bytes(self) -> int:
        """Weights on the device, with those being loaded."""
        held = sum(self._bytes[model] for model in self._used)
        return held + (self._bytes[self._loading] if self._loading is not None else 0)

    def is_resident(self, model: ModelId) -> bool:
        """Whether `model` may compute."""
        return model in self._used

    def touch(self, model: ModelId) -> None:
        """Note that `model`, if it is still resident, has just been used."""
        if model in self._used:
            self._enter(model)

    def drop(self, model: ModelId) -> None:
        """Note that the weights of `model` are not here any more, if they were."""
        self._used.pop(model, None)

    def plan(self, model: ModelId, evictable: Iterable[ModelId]) -> tuple[ModelId, ...] | None:
        """The models of `evictable` (best victim first) to drop so that `model` fits, or None."""
        missing = self.held_bytes + self._bytes[model] - self._budget_bytes
        victims: list[ModelId] = []
        for victim in evictable:
            if missing <= 0:
                break
            victims.append(victim)
            missing -= self._bytes[victim]
        if missing > 0:
            return None
        for victim in tuple(victims):  # a later, larger victim may have made it needless
            if missing + self._bytes[victim] <= 0:
                victims.remove(victim)
                missing += self._bytes[victim]
        return tuple(victims)

    def begin_load(self, model: ModelId, evict: Iterable[ModelId]) -> None:
        """The copy lane drops `evict` and brings in `model` from here on."""
        assert self._loading is None and model not in self._used
        for victim in evict:
            del self._used[victim]
        self._loading = model
        assert self.held_bytes <= self._budget_bytes

    def end_load(self, weight_bytes: int | None) -> None:
        """The load has ended: with that many bytes on the device, or (None) in failure."""
        assert self._loading is not None
        model, self._loading = self._loading, None
        if weight_bytes is not None:
            self._bytes[model] = weight_bytes
            self._enter(model)

    def _enter(self, model: ModelId) -> None:
        self._uses += 1
        self._used[model] = self._uses
