"""Keeps one model's costs true to what its actions take: refined after each of them.

Two things are learned. The line, slowly: least squares of relative errors, in which old actions
fade and a pull keeps the proportions that were measured before. And the level, quickly: a machine
that is busy with something else is slower in everything for a while.
"""

import math
from typing import TypeAlias

import msgspec

from aegaeon.scheduler.cost import ModelCost

# Chosen on recorded sequences of a busy machine (benchmark/calibrate.py prints the errors).
RATE = 0.5  # of an action's surprise, that the level of its own kind takes up
SHARED = 0.15  # and that of the other kind
MOST_SURPRISE = math.log(2)  # a stall is not believed to be more than this
MOST_LEVEL = math.log(20)
FADE = 0.99  # what an action still counts after another one
# How many actions the proportions from before count: as measured, and as guessed.
MEASURED, GUESSED = 1.0, 1e-3
UNSURE = 4  # first actions, that a guess gives way to as they are
LEAST_S = 1e-6
# Guesses on the slow side of what serves models: a policy that expects too little promises too
# much.
GUESSED_GB_PER_S = 20.0  # that a step of decoding reads
GUESSED_TFLOPS = 0.2  # of a prefill
GUESSED_LEAST_S = 1e-4
ROUNDING = 1e-9

Three: TypeAlias = tuple[float, float, float]


def guessed_cost(weight_gb: float, kv_gb_per_token: float, max_len: int) -> ModelCost:
    """Return costs of a model that nobody has measured, from its sizes.

    A step reads all weights once, and decoding the keys and values of its context; each token
    takes two operations for each weight, of two bytes, and attention about one for each byte of
    keys and values before it. Nothing is zero: what is learned later keeps proportions.
    """
    token_s = weight_gb / GUESSED_TFLOPS / 1e3
    pass_s = GUESSED_LEAST_S + weight_gb / GUESSED_GB_PER_S
    return ModelCost(
        weight_gb=weight_gb,
        kv_gb_per_token=kv_gb_per_token,
        max_len=max_len,
        prefill=(token_s, kv_gb_per_token / GUESSED_TFLOPS / 2e3, pass_s),
        decode=(kv_gb_per_token / GUESSED_GB_PER_S, token_s, pass_s),
    )


class Refiner:
    """Owns what is known of one model on one device. Times that are not above 0 teach nothing."""

    def __init__(self, cost: ModelCost, is_measured: bool = True) -> None:
        """Begin with `cost`, which is soon forgotten where it was only guessed."""
        weight = MEASURED if is_measured else GUESSED
        self._start = cost
        self._prefill = _Line(cost.prefill, weight)
        self._decode = _Line(cost.decode, weight)
        self._load_level = math.log(cost.load_factor)
        self._cost = cost

    @property
    def cost(self) -> ModelCost:
        """What the next actions will take, as far as is known."""
        return self._cost

    def note_prefill(self, tokens: int, squares: int, took_s: float) -> None:
        """Learn from a prefill of `tokens` in all; `squares` sums the squared lengths."""
        if tokens > 0 and took_s > 0:
            surprise = self._prefill.note((tokens, squares, 1.0), took_s)
            self._decode.shift(SHARED * surprise)
            self._update()

    def note_decode(self, context_tokens: int, requests: int, took_s: float) -> None:
        """Learn from a step of `requests` whose contexts sum up to `context_tokens`."""
        if requests > 0 and took_s > 0:
            surprise = self._decode.note((context_tokens, requests, 1.0), took_s)
            self._prefill.shift(SHARED * surprise)
            self._update()

    def note_load(self, predicted_s: float, took_s: float) -> None:
        """Learn from a load of which `Costs.load_s` of our cost had said `predicted_s`."""
        if predicted_s > 0 and took_s > 0:
            surprise = _bounded(math.log(took_s / predicted_s), MOST_SURPRISE)
            self._load_level = _bounded(self._load_level + RATE * surprise, MOST_LEVEL)
            self._update()

    def _update(self) -> None:
        self._cost = msgspec.structs.replace(
            self._start,
            prefill=self._prefill.coefficients,
            decode=self._decode.coefficients,
            load_factor=math.exp(self._load_level),
        )


class _Line:
    """A line through the times of one kind of actions, and the level at which they are now.

    Its coefficients are kept as multiples of those at the start, which so never change their sign;
    what was 0 stays 0.
    """

    def __init__(self, start: Three, weight: float) -> None:
        self._start = start
        self._weight = weight
        self._factors = [1.0, 1.0, 1.0]
        # The normal equations of sum((shares * factors - 1)^2), without the pull.
        self._squares = [[0.0] * 3 for _ in range(3)]
        self._sums = [0.0, 0.0, 0.0]
        self._level = 0.0
        self._unsure = 0 if weight == MEASURED else UNSURE

    @property
    def coefficients(self) -> Three:
        """The line at its level."""
        level = math.exp(self._level)
        a, b, c = (
            level * factor * start for factor, start in zip(self._factors, self._start, strict=True)
        )
        return a, b, max(c, LEAST_S)

    def note(self, amounts: Three, took_s: float) -> float:
        """Learn from an action; return how far it is off what was said, as a bounded logarithm."""
        shares = [
            amount * start / took_s for amount, start in zip(amounts, self._start, strict=True)
        ]
        before = _said(shares, self._factors)
        for i, share in enumerate(shares):
            self._sums[i] = FADE * self._sums[i] + share
            row = self._squares[i]
            for j, other in enumerate(shares):
                row[j] = FADE * row[j] + share * other
        self._factors = self._solved()
        surprise = -before - self._level
        most, rate = MOST_SURPRISE, RATE
        if self._unsure:
            self._unsure -= 1
            most, rate = math.inf, 1.0
        # The line gives proportions; how high it runs by itself is taken out again.
        compensated = self._level + before - _said(shares, self._factors)
        self._level = compensated + rate * _bounded(surprise, most)
        self._level = _bounded(self._level, MOST_LEVEL)
        return _bounded(surprise, MOST_SURPRISE)

    def shift(self, surprise: float) -> None:
        """Move the level."""
        self._level = _bounded(self._level + surprise, MOST_LEVEL)

    def _solved(self) -> list[float]:
        """Return the factors with the least errors, none negative, pulled towards a common one."""
        total = sum(map(sum, self._squares))
        common = max((sum(self._sums) + self._weight) / (total + self._weight), 0.0)
        pull = max(self._weight, ROUNDING * total)
        kept = [0, 1, 2]
        while kept:
            table = [
                [
                    *(self._squares[i][j] + (pull if i == j else 0.0) for j in kept),
                    self._sums[i] + pull * common,
                ]
                for i in kept
            ]
            found = _solve(table)
            least = min(range(len(kept)), key=found.__getitem__)
            if found[least] >= 0:
                factors = dict(zip(kept, found, strict=True))
                return [factors.get(i, 0.0) for i in range(3)]
            del kept[least]
        return [common] * 3


def _solve(table: list[list[float]]) -> list[float]:
    """Return x of equations [row | right side], of a positive definite matrix: no pivots needed."""
    size = len(table)
    for i in range(size):
        for k in range(i + 1, size):
            ratio = table[k][i] / table[i][i]
            table[k] = [b - ratio * a for a, b in zip(table[i], table[k], strict=True)]
    found = [0.0] * size
    for i in reversed(range(size)):
        rest = sum(table[i][j] * found[j] for j in range(i + 1, size))
        found[i] = (table[i][size] - rest) / table[i][i]
    return found


def _said(shares: list[float], factors: list[float]) -> float:
    """Return the logarithm of what a line says an action takes, of what it took."""
    said = sum(share * factor for share, factor in zip(shares, factors, strict=True))
    return math.log(said) if said > 0 else -MOST_LEVEL


def _bounded(value: float, most: float) -> float:
    return max(-most, min(most, value))
