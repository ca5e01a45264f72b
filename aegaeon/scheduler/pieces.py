"""How much of the prompts that wait is prefilled at once: what is short enough for those who run,
and long enough to be worth reading the weights for.

Chunked prefill as in "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve"
(OSDI'24), but that steps of others come between the pieces, not with them. Where a prompt is cut
never shows in its tokens.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from aegaeon.scheduler.cost import ModelCost
from aegaeon.scheduler.groups import Entry
from aegaeon.types import RequestId

# A piece takes no less than so many steps of those who run here, so that the prompt gets on, and no
# less than so many times what it takes whatever its length; more where there is no time to spare.
LEAST_STEPS, LEAST_STEPS_BUSY = 2.0, 4.0
LEAST_FIXED, LEAST_FIXED_BUSY = 4.0, 10.0
# Of the time between tokens that is promised, what a piece and the steps behind it may take: so
# much less that nobody notices, and that a piece that takes longer than expected harms nobody.
GAP = 1 / 3
TOKENS = 16  # a multiple of which is a piece: as keys and values are kept


class Bounds(NamedTuple):
    """What a piece may take, in seconds: no less than `least_s`, whatever `most_s` is."""

    least_s: float
    most_s: float


class Piece(NamedTuple):
    """The requests of a prefill, its bound in tokens (None: they are prefilled whole), and what it
    will take."""

    requests: tuple[RequestId, ...]
    max_tokens: int | None
    prefill_s: float


def bounds_between(steps_s: Sequence[float], tbt_s: float, cost: ModelCost) -> Bounds:
    """Return the bounds of a piece where there is time to spare, between steps of those who run and
    are promised a token each `tbt_s`."""
    round_s = sum(steps_s)
    # Twice as much for the prompt as for the others, as long as that keeps the promise.
    share_s = min(LEAST_STEPS * round_s, tbt_s - round_s)
    step_s = max(steps_s, default=0.0)
    least_s = max(LEAST_STEPS * step_s, share_s, LEAST_FIXED * cost.prefill[2])
    return Bounds(least_s, GAP * tbt_s - round_s)


def bounds_before(dues_s: Sequence[float], step_s: float, cost: ModelCost) -> Bounds:
    """Return the bounds of a piece where there is none: it ends before the next deadlines, so many
    seconds from now, of those for whom that is not too late."""
    least_s = max(LEAST_STEPS_BUSY * step_s, LEAST_FIXED_BUSY * cost.prefill[2])
    return Bounds(least_s, min((due_s for due_s in dues_s if due_s > least_s), default=math.inf))


def cut(entries: Sequence[Entry], cost: ModelCost, bounds: Bounds) -> Piece:
    """Return the next piece of `entries`, of which there are some, in their order; all of them
    where that is short enough, or half of it much too short."""
    whole_s = _takes_s(entries, cost, math.inf)
    tokens = sum(entry.tokens - entry.known for entry in entries)
    most_s = max(bounds.most_s, bounds.least_s)
    if whole_s <= max(most_s, 1.5 * bounds.least_s) or tokens <= TOKENS:
        return Piece(tuple(entry.id for entry in entries), None, whole_s)
    most = _tokens_in(most_s, entries, cost, tokens)
    if _takes_s(entries, cost, most) < bounds.least_s:
        most += TOKENS
    pieces = math.ceil(tokens / most)
    even = min(most, _up(math.ceil(tokens / pieces)))
    if even >= tokens:
        return Piece(tuple(entry.id for entry in entries), None, whole_s)
    picked: list[RequestId] = []
    left = even
    for entry in entries:
        if left <= 0:
            break
        picked.append(entry.id)
        left -= entry.tokens - entry.known
    return Piece(tuple(picked), even, _takes_s(entries, cost, even))


def _tokens_in(seconds: float, entries: Sequence[Entry], cost: ModelCost, most: int) -> int:
    """Return how many tokens of `entries`, less than `most`, a prefill gets on by in that time: a
    multiple of TOKENS, at least one."""
    low, high = 1, most // TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        if _takes_s(entries, cost, middle * TOKENS) <= seconds:
            low = middle
        else:
            high = middle - 1
    return low * TOKENS


def _takes_s(entries: Sequence[Entry], cost: ModelCost, most: float) -> float:
    """Return the time of a prefill of the next `most` tokens of `entries`."""
    tokens = squares = 0
    for entry in entries:
        end = min(entry.tokens, entry.known + most - tokens)
        tokens += int(end) - entry.known
        squares += int(end) ** 2 - entry.known**2
    return cost.prefill_s(tokens, squares)


def _up(tokens: int) -> int:
    return -(-tokens // TOKENS) * TOKENS
