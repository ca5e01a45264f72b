"""Costs that follow what a device's actions really take, for all its models."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import msgspec

from aegaeon.scheduler.cost import Costs, ModelCost
from aegaeon.scheduler.refine import Refiner
from aegaeon.types import ModelId


@dataclass
class Pace:
    """What all steps so far took, and what they would have by the costs from before the first."""

    took_s: float = 0.0
    expected_s: float = 0.0

    def note(self, took_s: float, expected_s: float) -> None:
        """Add a step."""
        self.took_s += took_s
        self.expected_s += expected_s


class LearningCosts:
    """An Observer. `costs` is what the policy is given: its `models` change as actions end."""

    def __init__(self, costs: Costs, measured: Collection[ModelId]) -> None:
        """Begin with `costs`; those of models that are not `measured` are soon forgotten."""
        self._refiners = {
            model: Refiner(cost, is_measured=model in measured)
            for model, cost in costs.models.items()
        }
        self._before = dict(costs.models)
        self._models = dict(costs.models)
        self.pace = Pace()
        self.costs = msgspec.structs.replace(costs, models=self._models)

    def enter(self, model: ModelId, cost: ModelCost, is_measured: bool) -> None:
        """Learn what the actions of `model` take, too; begin with `cost`."""
        self._refiners[model] = Refiner(cost, is_measured=is_measured)
        self._before[model] = self._models[model] = cost

    def leave(self, model: ModelId) -> None:
        """Forget `model`, of which nothing happens any more."""
        for known in (self._refiners, self._before, self._models):
            known.pop(model, None)

    def prefilled(
        self, model: ModelId, lengths: Sequence[int], cached: Sequence[int], took_s: float
    ) -> None:
        """Prompts of `lengths` tokens were prefilled together, each behind its first `cached`
        ones: these are only looked at."""
        pairs = tuple(zip(lengths, cached, strict=True))
        tokens = [length - found for length, found in pairs]
        squares = [length * length - found * found for length, found in pairs]
        self.pace.note(took_s, sum(map(self._before[model].prefill_s, tokens, squares)))
        self._refiners[model].note_prefill(sum(tokens), sum(squares), took_s)
        self._update(model)

    def decoded(self, model: ModelId, contexts: Sequence[int], took_s: float) -> None:
        """Sequences of `contexts` tokens got one more each."""
        expected_s = self._before[model].decode_s(sum(contexts), len(contexts))
        self.pace.note(took_s, expected_s)
        self._refiners[model].note_decode(sum(contexts), len(contexts), took_s)
        self._update(model)

    def loaded(self, model: ModelId, took_s: float) -> None:
        """The weights came."""
        predicted_s = self.costs.load_s(self._models[model])
        self._refiners[model].note_load(predicted_s, took_s)
        self._update(model)

    def _update(self, model: ModelId) -> None:
        self._models[model] = self._refiners[model].cost
