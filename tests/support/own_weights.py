"""Weights of one process alone, made by a function instead of read from files."""

from contextlib import contextmanager

from aegaeon.errors import WeightsEvicted
from aegaeon.memory.weights import BroughtIn, Weights


class OwnWeights(Weights):
    """`make(model)` gives what computes; it stays until it is dropped."""

    def __init__(self, make, budget_bytes=4 << 20):
        self.make = make
        self.models = {}
        self.wanted = {}
        self._budget_bytes = budget_bytes

    @property
    def used_bytes(self):
        return sum(model.weight_bytes for model in self.models.values())

    @property
    def budget_bytes(self):
        return self._budget_bytes

    def bring_in(self, model, evict):
        for victim in evict:
            self.drop(victim)
        if model not in self.models:
            self.models[model] = self.make(model)
        return BroughtIn(self.models[model].weight_bytes)

    def await_rest(self, model, may_begin):
        return True

    @contextmanager
    def use(self, model):
        if model not in self.models:
            raise WeightsEvicted(f"no {model}")
        yield self.models[model]

    def drop(self, model):
        self.models.pop(model, None)

    def set_demand(self, model, is_wanted):
        self.wanted[model] = is_wanted

    def close(self):
        self.models.clear()
