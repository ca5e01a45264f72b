"""TTFT, TBT, attainment of targets, goodput and fairness: the one definition of each.

For the server, the simulator and the benchmarks.

Pure: times come in as numbers; nothing here measures.
"""

import bisect
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

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


class Target(msgspec.Struct, frozen=True):
    """What is promised: a first token after `ttft_s`, each further one `tbt_s` later.

    Token k of a request, from 0, is due at arrival + ttft_s + k * tbt_s: whoever is ahead has so
    much to spend.
    """

    ttft_s: float = 10.0
    tbt_s: float = 0.1

    def due_s(self, arrival_s: float, token: int) -> float:
        """Return when token number `token` is due."""
        return arrival_s + self.ttft_s + token * self.tbt_s


class TokenRuns(Sequence[float]):
    """Times of tokens that came in runs of evenly lengthening steps, without a number for each.

    Token k of a run, from 1, came at start + k * step + growth * k * (k - 1) / 2; growth is at
    least 0.
    """

    __slots__ = ("_count", "_ends", "_runs")

    def __init__(self) -> None:
        self._runs: list[tuple[float, float, float, int]] = []
        self._ends: list[int] = []  # tokens up to the end of each run
        self._count = 0

    def add(self, start_s: float, step_s: float, growth_s: float, tokens: int) -> None:
        """Add a run of `tokens` that began at `start_s`, behind the others."""
        self._runs.append((start_s, step_s, growth_s, tokens))
        self._count += tokens
        self._ends.append(self._count)

    def edges(self) -> Iterator[tuple[int, float]]:
        """Yield number and time of the first and the last token of each run. The others are no
        later, measured against any even pace, than the later one of these."""
        first = 0
        for start_s, step_s, growth_s, tokens in self._runs:
            yield first, start_s + step_s
            first += tokens
            if tokens > 1:
                pairs = tokens * (tokens - 1) // 2
                yield first - 1, start_s + (tokens * step_s + growth_s * pairs)

    def __len__(self) -> int:
        """Return the number of tokens."""
        return self._count

    @overload
    def __getitem__(self, index: int) -> float: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[float]: ...
    def __getitem__(self, index: int | slice) -> float | Sequence[float]:
        """Return the time of a token."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(self._count))]
        place = index + self._count if index < 0 else index
        if not 0 <= place < self._count:
            raise IndexError(index)
        run = bisect.bisect_right(self._ends, place)
        start_s, step_s, growth_s, tokens = self._runs[run]
        k = place - (self._ends[run] - tokens) + 1
        return start_s + (k * step_s + growth_s * (k * (k - 1) // 2))

    def __iter__(self) -> Iterator[float]:
        """Yield the times in order."""
        for start_s, step_s, growth_s, tokens in self._runs:
            for k in range(1, tokens + 1):
                yield start_s + (k * step_s + growth_s * (k * (k - 1) // 2))


class Served(msgspec.Struct, frozen=True):
    """What became of a request: when its tokens came, and how many there should have been.

    With `is_failed` it was dropped, refused or broken off: a miss in every metric, whatever it had
    got by then.
    """

    model: str
    arrival_s: float
    token_times_s: Sequence[float]
    wanted_tokens: int
    is_failed: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether it got what it wanted."""
        return not self.is_failed and len(self.token_times_s) >= self.wanted_tokens > 0


class Attainment(msgspec.Struct, frozen=True):
    """Shares of a load that kept `Target`, in [0, 1]; all 1 for no requests.

    `time`: of each request's service time, the part inside deadlines, averaged over requests, as
    Aegaeon's artifact counts it (SOSP'25); lenient after a miss. `token`: of all tokens, those made
    by their due time. `request`: of all requests, those with TTFT and mean TBT within the target.
    """

    time: float
    token: float
    request: float


def attainment(served: Iterable[Served], target: Target) -> Attainment:
    """Return what share of `served` kept `target`, by each of the three definitions."""
    requests = tuple(served)
    wanted = sum(max(one.wanted_tokens, 1) for one in requests)
    if not requests:
        return Attainment(1.0, 1.0, 1.0)
    return Attainment(
        time=math.fsum(time_share(one, target) for one in requests) / len(requests),
        token=sum(tokens_in_time(one, target) for one in requests) / wanted,
        request=sum(keeps(one, target) for one in requests) / len(requests),
    )


def keeps(one: Served, target: Target) -> bool:
    """Whether a request's TTFT and mean TBT are within the target."""
    if not one.is_complete:
        return False
    times = one.token_times_s
    gaps = len(times) - 1
    return times[0] - one.arrival_s <= target.ttft_s and (
        gaps == 0 or (times[-1] - times[0]) / gaps <= target.tbt_s
    )


def tokens_in_time(one: Served, target: Target) -> int:
    """Return how many tokens of a request were made by their due time."""
    if not one.is_complete:
        return 0
    times = one.token_times_s
    if isinstance(times, TokenRuns) and _is_in_time(times, one.arrival_s, target):
        return len(times)
    return sum(at_s <= target.due_s(one.arrival_s, token) for token, at_s in enumerate(times))


def _is_in_time(times: TokenRuns, arrival_s: float, target: Target) -> bool:
    """Whether all tokens are: those at both ends of each run are the latest of it, as steps get
    longer and targets do not."""
    return all(at_s <= target.due_s(arrival_s, token) for token, at_s in times.edges())


def time_share(one: Served, target: Target) -> float:
    """Return the part of a request's service time that lay inside deadlines.

    Each gap that is in time moves the next deadline on by a TBT; one that is late ends what had
    been earned, and deadlines count from there.
    """
    if not one.is_complete:
        return 0.0
    total_s = one.token_times_s[-1] - one.arrival_s
    if total_s <= 0:
        return 1.0
    if tokens_in_time(one, target) == len(one.token_times_s):
        return 1.0  # nothing was late, so nothing ended what was earned
    start_s = earned_s = kept_s = 0.0
    due_s = target.ttft_s
    for at_s in one.token_times_s:
        elapsed_s = at_s - one.arrival_s
        if elapsed_s - start_s <= due_s:
            earned_s = due_s
        else:
            kept_s += earned_s
            start_s, earned_s = elapsed_s, 0.0
        due_s += target.tbt_s
    kept_s += min(due_s, total_s - start_s)
    return kept_s / total_s


def goodput(points: Iterable[tuple[float, float]], least: float = 0.9) -> float | None:
    """Return the highest load whose attainment is at least `least`: of `points` (load, attainment),
    linear between neighbours. None when even the lowest load has less."""
    best: float | None = None
    previous: tuple[float, float] | None = None
    for load, share in sorted(points):
        if share >= least:
            best = load
        elif previous is not None and previous[1] >= least:
            drop = (previous[1] - least) / (previous[1] - share)
            best = previous[0] + drop * (load - previous[0])
        previous = (load, share)
    return best


def fairness(shares: Iterable[float]) -> float:
    """Return Jain's index of what each model got: 1 when all got the same, 1/n when one got all
    (Jain, Chiu, Hawe 1984). 1 when nobody got anything."""
    values = tuple(shares)
    squares = math.fsum(value * value for value in values)
    return math.fsum(values) ** 2 / (len(values) * squares) if squares else 1.0


def switch_time_share(switching_s: float, devices: int, elapsed_s: float) -> float:
    """Return the part of all devices' time in which they switched and did nothing else."""
    return switching_s / (devices * elapsed_s) if devices and elapsed_s > 0 else 0.0
