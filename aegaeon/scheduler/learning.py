"""Costs that follow what a device's actions really take, for all its models."""

from collections.abc import Collection, Sequence

import msgspec

from aegaeon.scheduler.cost import Costs
from aegaeon.scheduler.refine import Refiner
from aegaeon.types import ModelId


class LearningCosts:
    """An Observer. `costs` is what the policy is given: its `models` change as actions end."""

    def __init__(self, costs: Costs, measured: Collection[ModelId]) -> None:
        """Begin with `costs`; those of models that are not `measured` are soon forgotten."""
        self._refiners = {
            model: Refiner(cost, is_measured=model in measured)
            for model, cost in costs.models.items()
        }
        self._models = dict(costs.models)
        self.costs = msgspec.structs.replace(costs, models=self._models)

    def prefilled(self, model: ModelId, lengths: Sequence[int], took_s: float) -> None:
        """Prompts of `lengths` tokens were prefilled together."""
        squares = sum(length * length for length in lengths)
        self._refiners[model].note_prefill(sum(lengths), squares, took_s)
        self._update(model)

    def decoded(self, model: ModelId, contexts: Sequence[int], took_s: float) -> None:
        """Sequences of `contexts` tokens got one more each."""
        self._refiners[model].note_decode(sum(contexts), len(contexts), took_s)
        self._update(model)

    def loaded(self, model: ModelId, took_s: float) -> None:
        """The weights came."""
        predicted_s = self.costs.load_s(self._models[model])
        self._refiners[model].note_load(predicted_s, took_s)
        self._update(model)

    def _update(self, model: ModelId) -> None:
        self._models[model] = self._refiners[model].cost
