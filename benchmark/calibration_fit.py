"""Linear models fitted to what actions took, and how far from it predictions are."""

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, median, quantiles
from typing import Literal

import msgspec
import numpy as np

from aegaeon.scheduler.cost import ModelCost
from aegaeon.scheduler.refine import Refiner
from benchmark.report_rows import Aim, Row, measured

LEAST_S = 1e-6  # of a constant, which must not be 0
# Errors below this weigh as squares, those above only as themselves: stalls have no say.
SMALL_ERROR = 0.05
REWEIGHTED = 20
AIMS = ((50, 10.0), (90, 25.0))  # percentiles of the error, and the most that they may be, in %

Kind = Literal["prefill", "decode"]
Line = tuple[float, ...]  # a coefficient for each amount, and the constant


class Sample(msgspec.Struct, frozen=True):
    """What an action was made of (prefill: tokens and squared lengths; decode: context and
    requests; a copy: GB), and the seconds it took."""

    amounts: tuple[float, ...]
    took_s: float


class Step(msgspec.Struct, frozen=True):
    """A sample of a kind, in the order in which a model's actions were done."""

    kind: Kind
    sample: Sample


def middle(samples: Sequence[Sample]) -> Sample:
    """Return one sample for several of about the same: the mean amounts, the median time."""
    amounts = zip(*(sample.amounts for sample in samples), strict=True)
    return Sample(tuple(map(fmean, amounts)), median(sample.took_s for sample in samples))


def fit(samples: Sequence[Sample]) -> Line:
    """Return the line with the least relative errors, none of whose coefficients is negative.

    What the samples cannot tell apart, or would have negative, is left out (0).
    """
    table = np.array([(*sample.amounts, 1.0) for sample in samples])
    table /= np.array([sample.took_s for sample in samples])[:, None]
    kept = list(range(table.shape[1]))
    while len(kept) > 1 and np.linalg.matrix_rank(table[:, kept]) < len(kept):
        kept.pop()
    while True:
        found = _reweighted(table[:, kept])
        shares = found * table[:, kept].mean(axis=0)
        worst = int(shares.argmin())
        if shares[worst] >= 0 or len(kept) == 1:
            break
        del kept[worst]
    line = np.zeros(table.shape[1])
    line[kept] = found
    return (*map(float, line[:-1]), max(float(line[-1]), LEAST_S))


def _reweighted(table: np.ndarray) -> np.ndarray:
    """Solve table @ x = 1 for small errors, by least squares weighted again and again."""
    weights = np.ones(len(table))
    for _ in range(REWEIGHTED):
        found = np.linalg.lstsq(table * weights[:, None], weights, rcond=None)[0]
        wrong = np.abs(table @ found - 1)
        weights = np.sqrt(1 / np.maximum(wrong, SMALL_ERROR))
    return np.asarray(found)


def predict(line: Line, sample: Sample) -> float:
    """Return the seconds that `line` says."""
    return sum(a * x for a, x in zip(line, (*sample.amounts, 1.0), strict=True))


def errors(line: Line, samples: Iterable[Sample]) -> list[float]:
    """Return the relative error of each prediction, in percent."""
    return [_error(predict(line, sample), sample.took_s) for sample in samples]


def replay(
    cost: ModelCost, steps: Sequence[Step], is_measured: bool = True
) -> tuple[dict[Kind, list[float]], dict[Kind, list[float]]]:
    """Return the errors, in percent, of predicting each step before it is done: by `cost` as it
    is, and as refined by the steps before."""
    refiner = Refiner(cost, is_measured)
    plain: dict[Kind, list[float]] = {"prefill": [], "decode": []}
    refined: dict[Kind, list[float]] = {"prefill": [], "decode": []}
    for step in steps:
        first, second = map(int, step.sample.amounts)
        note: Callable[[int, int, float], None] = refiner.note_decode
        before_s, after_s = cost.decode_s(first, second), refiner.cost.decode_s(first, second)
        if step.kind == "prefill":
            note = refiner.note_prefill
            before_s, after_s = cost.prefill_s(first, second), refiner.cost.prefill_s(first, second)
        took_s = step.sample.took_s
        plain[step.kind].append(_error(before_s, took_s))
        refined[step.kind].append(_error(after_s, took_s))
        note(first, second, took_s)
    return plain, refined


def error_rows(case: str, found: Sequence[float], has_aim: bool = True) -> list[Row]:
    """Return rows of the percentiles of errors; none for less than two."""
    if len(found) < 2:
        return []
    cuts = quantiles(found, n=100, method="inclusive")
    rows = []
    for percentile, bound in AIMS:
        row = Row(case=f"{case}, error p{percentile}", unit="%", ours=cuts[percentile - 1])
        aim = Aim("ours", bound, f"<= {bound:g} %", is_least=False) if has_aim else None
        rows.append(measured(row, aim))
    return rows


def _error(predicted_s: float, took_s: float) -> float:
    return 100 * abs(predicted_s / took_s - 1)
