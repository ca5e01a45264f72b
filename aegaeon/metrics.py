"""TTFT, TBT and summaries of samples: the one definition of each, for benchmarks and the server.

Pure: times come in as numbers; nothing here measures.
"""

import itertools
import math
from collections.abc import Iterable, Sequence

import msgspec


class Summary(msgspec.Struct, frozen=True):
    """Mean and percentiles of samples, in their unit; all None when there are no samples."""

    avg: float | None
    p50: float | None
    p90: float | None
    p99: float | None


def summarize(samples: Iterable[float]) -> Summary:
    """Summarise finite `samples`."""
    ordered = sorted(samples)
    if not ordered:
        return Summary(None, None, None, None)
    return Summary(
        avg=math.fsum(ordered) / len(ordered),
        p50=percentile(ordered, 50),
        p90=percentile(ordered, 90),
        p99=percentile(ordered, 99),
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return the percentile of sorted, non-empty `ordered`, linear between neighbours."""
    assert ordered and 0 <= percent <= 100
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    low, high = ordered[below], ordered[above]
    return min(low + (high - low) * (place - below), high)


def time_to_first_token_s(arrival_s: float, token_times_s: Sequence[float]) -> float | None:
    """Return the time from arrival to the first token: waiting, loading, switching and prefill."""
    return token_times_s[0] - arrival_s if token_times_s else None


def times_between_tokens_s(token_times_s: Sequence[float]) -> tuple[float, ...]:
    """Return the gap before each token but the first; tokens that come together are 0 apart."""
    return tuple(later - earlier for earlier, later in itertools.pairwise(token_times_s))
