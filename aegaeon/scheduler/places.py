"""Where a request goes: what dispatchers see of each device, and the seam they stand behind."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

from aegaeon.types import ModelId, Role


class Place(Protocol):
    """A device as a dispatcher sees it: published by an instance, or the scheduler itself."""

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
    """Chooses places; what it remembers only helps to choose well."""

    @abstractmethod
    def dispatch(self, places: Sequence[Place], model: ModelId) -> int:
        """Return the index of the place, of at least one, that prefills a request of `model`."""

    @abstractmethod
    def dispatch_prefilled(self, places: Sequence[Place], model: ModelId) -> int:
        """Return the index of the place, of at least one, that decodes it."""


class HomeDispatcher(Dispatcher):
    """A model has one home while it has requests there; then the least busy place is its next.

    Its last home counts as less busy by `stay`, and twice that while the weights are there.
    """

    def __init__(self, stay: float = 0.045) -> None:
        self._stay = stay
        self._homes: dict[ModelId, int] = {}

    def dispatch(self, places: Sequence[Place], model: ModelId) -> int:
        """Return the home of `model`, or its new one."""
        home = self._homes.get(model, -1)
        stay = 0.0
        if 0 <= home < len(places):
            if places[home].requests_of(model):
                return home
            stay = self._stay * (2 if places[home].is_resident(model) else 1)
        best, best_load = -1, float("inf")
        for index, place in enumerate(places):
            load = place.load
            if index == home:
                load -= stay
            if load < best_load:
                best, best_load = index, load
        self._homes[model] = best
        return best

    def dispatch_prefilled(self, places: Sequence[Place], model: ModelId) -> int:
        """As `dispatch`."""
        return self.dispatch(places, model)
