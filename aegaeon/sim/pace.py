"""What actions take, and when the steps of a run end: in closed form, and to the last bit what
single steps would give.

All durations are multiples of a power of two of a second, so sums of them are exact for hours.
"""

import math
from collections.abc import Mapping

from aegaeon.scheduler.cost import Costs, ModelCost
from aegaeon.types import ModelId, Stretch

QUANTUM = 2.0**-38  # s; exact in a double up to 2**15 s


def exact(seconds: float) -> float:
    """Return `seconds`, rounded to the quantum."""
    return round(seconds / QUANTUM) * QUANTUM


class StepCosts:
    """A model's decode steps, exactly."""

    __slots__ = ("_fixed_s", "_per_request_s", "_per_token_s")

    def __init__(self, cost: ModelCost) -> None:
        per_token, per_request, fixed = cost.decode
        self._per_token_s = exact(max(per_token, 0.0))
        self._per_request_s = exact(max(per_request, 0.0))
        self._fixed_s = exact(fixed)

    def pace(self, start_s: float, context_tokens: int, requests: int) -> "Pace":
        """Return the run that begins at `start_s` with so much context in the whole batch."""
        step_s = self._per_token_s * context_tokens + self._per_request_s * requests + self._fixed_s
        return Pace(start_s, step_s, self._per_token_s * requests)


class Pace:
    """Steps from `start_s` on: the first takes `step_s`, each further one `growth_s` more."""

    __slots__ = ("growth_s", "start_s", "step_s")

    def __init__(self, start_s: float, step_s: float, growth_s: float) -> None:
        self.start_s = start_s
        self.step_s = step_s
        self.growth_s = growth_s

    def end_s(self, steps: int) -> float:
        """Return when step number `steps` ends."""
        growth_s = self.growth_s * (steps * (steps - 1) // 2)
        return self.start_s + (steps * self.step_s + growth_s)

    def steps_before(self, at_s: float, most: int) -> int:
        """Return how many steps, at most `most`, end before `at_s`."""
        if most <= 0 or at_s <= self.start_s:
            return 0
        if self.end_s(most) < at_s:
            return most
        steps = min(int(self._steps_in(at_s - self.start_s)), most)
        while steps > 0 and self.end_s(steps) >= at_s:
            steps -= 1
        while steps < most and self.end_s(steps + 1) < at_s:
            steps += 1
        return steps

    def steps_of(self, stretch: Stretch, most: int) -> int:
        """Return after how many steps, at most `most`, `stretch` is over; at least one."""
        steps = max(min(most, stretch.steps), 1)
        if self.end_s(steps) >= stretch.until_s:
            steps = self.steps_before(stretch.until_s, steps - 1) + 1
        if stretch.lead_s < math.inf:
            steps = self._steps_to_lead(stretch, steps)
        return steps

    def _steps_to_lead(self, stretch: Stretch, most: int) -> int:
        """The first step that gets far enough ahead: the lead grows, then may shrink again."""
        gain_s = stretch.tbt_s - self.step_s + self.growth_s / 2
        missing_s = stretch.lead_s - (stretch.first_s + stretch.made * stretch.tbt_s - self.start_s)
        if missing_s <= 0:
            steps = 1
        elif gain_s <= 0:
            return most
        else:
            root = gain_s * gain_s - 2 * self.growth_s * missing_s
            if root < 0:
                return most
            # The smaller root of growth / 2 * n^2 - gain * n + missing, in its stable form.
            # Where hardly anything is gained it is far beyond `most`, or even infinite.
            steps = max(1, int(min(most, 2 * missing_s / (gain_s + math.sqrt(root)))))
        while steps > 1 and self._leads(stretch, steps - 1):
            steps -= 1
        while steps < most and not self._leads(stretch, steps):
            steps += 1
        return min(steps, most)

    def _leads(self, stretch: Stretch, steps: int) -> bool:
        due_s = stretch.first_s + (stretch.made + steps) * stretch.tbt_s
        return due_s - self.end_s(steps) >= stretch.lead_s

    def _steps_in(self, seconds: float) -> float:
        if self.growth_s <= 0:
            return seconds / self.step_s
        linear = self.step_s - self.growth_s / 2
        return 2 * seconds / (linear + math.sqrt(linear * linear + 2 * self.growth_s * seconds))


class Prices:
    """What actions take on one kind of device, in exact multiples of the quantum."""

    def __init__(self, costs: Costs, models: Mapping[ModelId, ModelCost]) -> None:
        self.models = models
        self.switch_s = exact(costs.switch_s)
        self.rest_s = math.inf if costs.rest_s is None else exact(costs.rest_s)
        self._costs = costs
        self._steps = {cost: StepCosts(cost) for cost in set(models.values())}
        self._steps_of = {model: self._steps[cost] for model, cost in models.items()}

    def steps(self, model: ModelId) -> StepCosts:
        """Return what decoding takes."""
        return self._steps_of[model]

    def prefill_s(self, model: ModelId, spans: list[tuple[int, int]]) -> float:
        """Return the time of a prefill of the tokens of prompts from one on and before another."""
        squares = sum(stop * stop - start * start for start, stop in spans)
        tokens = sum(stop - start for start, stop in spans)
        return exact(self.models[model].prefill_s(tokens, squares))

    def load_s(self, model: ModelId) -> float:
        """Return the time in which weights come over the link."""
        return exact(self._costs.load_s(self.models[model]))

    def move_s(self, gigabytes: float) -> float:
        """Return the time in which so much of keys and values goes over the link."""
        if not gigabytes or not self._costs.is_kv_moved:
            return 0.0
        return exact(gigabytes / self._costs.link_gb_per_s + self._costs.move_fixed_s)
