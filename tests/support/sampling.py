"""The reference of sampling: picks the next token from one row of logits, in float64 and plain
numpy, with a draw keyed by (seed, position).

Greedy is the lowest id of the highest logit. Otherwise, in the order of `transformers`:
temperature, top-k (ties with the k-th stay), top-p (the fewest most likely tokens whose mass
reaches it), min-p (against the most likely token); then the inverse CDF in id order.
"""

import numpy as np
from numpy.typing import NDArray

from aegaeon.types import SamplingParams

Logits = NDArray[np.float32]
Ids = NDArray[np.int64]
Weights = NDArray[np.float64]

SEED_MASK = (1 << 64) - 1
FIRST_CANDIDATES = 1024


def pick_token(logits: Logits, params: SamplingParams, position: int) -> int:
    """Return the token for `position` (0-based among the generated ones) from logits [vocab].

    Logits are finite. Depends on nothing but the arguments.
    """
    if params.temperature <= 0.0:
        return int(np.argmax(logits))
    ids, weights = candidates(logits, params)
    heights = np.cumsum(weights)
    draw = uniform(params.seed, position) * heights[-1]
    # A draw that rounds up to the total would fall behind the last token.
    return int(ids[min(int(np.searchsorted(heights, draw, side="right")), len(ids) - 1)])


def candidates(logits: Logits, params: SamplingParams) -> tuple[Ids, Weights]:
    """Return the tokens that may be drawn, by id, and their unnormalised probabilities."""
    scaled = (logits.astype(np.float64) - float(logits.max())) / params.temperature
    ids: Ids = np.arange(len(scaled))
    if 0 < params.top_k < len(scaled):
        threshold = np.partition(scaled, -params.top_k)[-params.top_k]
        ids = ids[scaled >= threshold]
    weights = np.exp(scaled[ids])
    if params.top_p < 1.0:
        kept = _nucleus(weights, params.top_p)
        ids, weights = ids[kept], weights[kept]
    if params.min_p > 0.0:
        # The most likely token has weight 1.
        likely = weights >= min(params.min_p, 1.0)
        ids, weights = ids[likely], weights[likely]
    return ids, weights


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) that belongs to (seed, position): Philox, 53 bits."""
    key = np.array([seed & SEED_MASK, position], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key)).random())


def _nucleus(weights: Weights, top_p: float) -> Ids:
    """Return the indices, ascending, of the fewest largest weights whose share reaches top_p."""
    wanted = top_p * float(weights.sum())
    count = FIRST_CANDIDATES
    while True:
        # Sorting a vocabulary takes milliseconds and the nucleus is small: sort its head only.
        head = np.arange(len(weights))
        if count < len(weights):
            threshold = np.partition(weights, -count)[-count]
            head = np.flatnonzero(weights >= threshold)
        head = head[np.argsort(-weights[head], kind="stable")]
        heights = np.cumsum(weights[head])
        if heights[-1] >= wanted or count >= len(weights):
            kept = int(np.searchsorted(heights, wanted, side="left")) + 1
            return np.sort(head[:kept])
        count *= 4


def adjust(logits: Logits, params: SamplingParams, prompt: list[int], made: list[int]) -> Logits:
    """Return what penalties and bias make of logits [vocab]: csrc/ops/adjustment.h, token by token,
    in float64."""
    row = [float(logit) for logit in logits]
    bias: dict[int, float] = {}
    for token, added in params.logit_bias:
        bias[token] = bias.get(token, 0.0) + added
    for token in range(len(row)):
        count = made.count(token)
        if token in prompt or count:
            r = params.repetition_penalty
            row[token] = row[token] / r if row[token] > 0 else row[token] * r
        row[token] -= params.presence_penalty * (count > 0)
        row[token] -= params.frequency_penalty * count
        row[token] += bias.get(token, 0.0)
    furthest = float(np.finfo(np.float32).max)  # numpy's own numbers would warn of what is beyond
    return np.array(row).clip(-furthest, furthest).astype(np.float32)


def pick_allowed(
    logits: Logits, params: SamplingParams, position: int, allowed: NDArray[np.bool_]
) -> int | None:
    """As `pick_token`, of a row that has only the tokens allowed."""
    ids = np.flatnonzero(allowed)
    return int(ids[pick_token(logits[ids], params, position)]) if len(ids) else None
