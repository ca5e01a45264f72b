"""Where a request goes: what dispatchers see of each device, and the seam they stand behind."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from aegaeon.types import InstanceId, ModelId, Role


class Place(Protocol):
    """A device as a dispatcher sees it: published by an instance, or the scheduler itself."""

    @property
    def id(self) -> InstanceId:
        """The same as long as it lives."""

    @property
    def role(self) -> Role:
        """What it does."""

    @property
    def load(self) -> float:
        """How busy it is, in the measure of its policy."""

    def requests_of(self, model: ModelId) -> int:
        """Return how many requests of `model` wait or run there."""

    def is_resident(self, model: ModelId) -> bool:
        """Whether the weights of `model` are there, or on their way."""

    def joins(self, model: ModelId) -> bool:
        """Whether one more request of `model` would not make it switch once more."""


class Dispatcher(ABC):
    """Chooses places; what it remembers only helps to choose well.

    With `has_peers` others choose among the same places, and what they did may be seen there.
    """

    has_peers = False

    @abstractmethod
    def dispatch(self, places: Sequence[Place], model: ModelId) -> int:
        """Return the index of the place, of at least one, that prefills a request of `model`."""

    @abstractmethod
    def dispatch_prefilled(self, places: Sequence[Place], model: ModelId) -> int:
        """Return the index of the place, of at least one, that decodes it."""


class _Home(NamedTuple):
    """Where a model lives, and where in the places that was lately."""

    id: InstanceId
    at: int


class HomeDispatcher(Dispatcher):
    """A model has one home while it has requests there; then the least busy place is its next.

    Its last home counts as less busy by `stay`, and twice that while the weights are there. A model
    without a home lives where most of its requests are, else any place with its weights is one.
    With `full` requests of it at home, it moves to a place that is less than half as busy.
    """

    def __init__(self, stay: float = 0.045, full: int = 16) -> None:
        self._stay = stay
        self._full = full
        self._homes: dict[ModelId, _Home] = {}
        self._decode_homes: dict[ModelId, _Home] = {}

    def dispatch(self, places: Sequence[Place], model: ModelId) -> int:
        """Return the home of `model`, or its new one."""
        return self._home(self._homes, places, model)

    def dispatch_prefilled(self, places: Sequence[Place], model: ModelId) -> int:
        """As `dispatch`; a home of its own."""
        return self._home(self._decode_homes, places, model)

    def _home(self, homes: dict[ModelId, _Home], places: Sequence[Place], model: ModelId) -> int:
        home = _find(homes.get(model), places)
        best = None
        if home is not None:
            count = places[home].requests_of(model)
            if 0 < count < self._full:
                return home
            if count:
                best = self._least_busy(places, model, home)
                if 2 * places[best].load >= places[home].load:
                    return home
        if best is None and (home is None or self.has_peers):
            best = _with_most(places, model)
        if best is None:
            best = self._least_busy(places, model, home)
        homes[model] = _Home(places[best].id, best)
        return best

    def _least_busy(self, places: Sequence[Place], model: ModelId, home: int | None) -> int:
        loads = [place.load for place in places]
        for index in range(len(places)) if home is None else (home,):
            if places[index].is_resident(model):
                loads[index] -= self._stay * 2
            elif home is not None:
                loads[index] -= self._stay
        return loads.index(min(loads))


def _find(home: _Home | None, places: Sequence[Place]) -> int | None:
    """Return the index of `home` now, if it is among `places`."""
    if home is None:
        return None
    if home.at < len(places) and places[home.at].id == home.id:
        return home.at
    return next((index for index, place in enumerate(places) if place.id == home.id), None)


def _with_most(places: Sequence[Place], model: ModelId) -> int | None:
    """Return which of `places` has the most requests of `model`, if one has any."""
    best, most = None, 0
    for index, place in enumerate(places):
        count = place.requests_of(model)
        if count > most:
            best, most = index, count
    return best
