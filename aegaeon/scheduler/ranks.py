"""Which models come first where a device cannot do all: their priorities."""

from collections.abc import Iterable, Mapping

from aegaeon.specs import PRIORITIES, Priority
from aegaeon.types import ModelId

# Of the room to wait, the part that is not for models of a level lower than the highest served.
LEVEL_ROOM = 1 / 8
# So many requests of a lower level weigh as one of this one: more than there are.
LEVEL_WORTH = 1e6


def level(priority: Priority) -> int:
    """Return the priority as a number: more comes first."""
    return PRIORITIES.index(priority)


class Ranks:
    """The priorities of the models served; all are alike until told otherwise."""

    def __init__(self, active: Mapping[ModelId, object]) -> None:
        """`active` has the models that have requests; `changed` is called when others do."""
        self._active = active
        self._levels: dict[ModelId, int] = {}  # of those that are not as most
        # The lowest and the highest of those that have requests; None: to be found.
        self._bounds: tuple[int, int] | None = None

    @property
    def are_used(self) -> bool:
        """Whether any model has another priority than most."""
        return bool(self._levels)

    def set(self, model: ModelId, priority: Priority) -> None:
        """Give `model` its priority."""
        if priority == "normal":
            self._levels.pop(model, None)
        else:
            self._levels[model] = level(priority)
        self._bounds = None

    def changed(self) -> None:
        """Other models have requests now."""
        self._bounds = None

    def of(self, model: ModelId) -> int:
        """Return the level of `model`."""
        return self._levels.get(model, _NORMAL)

    def below(self, model: ModelId) -> int:
        """Return how many levels `model` is below the highest of those that have requests."""
        return max(0, self._look()[1] - self.of(model))

    def above(self, model: ModelId) -> int:
        """Return how many levels `model` is above the lowest of those that have requests."""
        return max(0, self.of(model) - self._look()[0])

    def _look(self) -> tuple[int, int]:
        if self._bounds is None:
            levels = set(map(self.of, self._active)) or {_NORMAL}
            self._bounds = min(levels), max(levels)
        return self._bounds

    def worth(self, model: ModelId) -> float:
        """Return what one request of `model` weighs, those of most models weighing 1."""
        return float(LEVEL_WORTH ** (self.of(model) - _NORMAL)) if self._levels else 1.0


def room_of(most: int, model: int, served: Iterable[int]) -> int:
    """Return how many of `most` places a model of one level may fill, where others have those of
    `served`: for each level that it is below the highest of them, LEVEL_ROOM less."""
    below = max(0, max(served, default=model) - model)
    return max(1, most - int(most * LEVEL_ROOM * below))


_NORMAL = level("normal")
