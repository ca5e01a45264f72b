"""What processor and memory do at most here, and how operators are timed beside that."""

import os
import time
from collections.abc import Callable, Mapping
from statistics import median

import msgspec

from aegaeon import _native
from aegaeon.memory.arena import Arena
from aegaeon.memory.budget import GB
from benchmark.calibration_runs import busy_seconds
from benchmark.report_rows import Row

Run = Callable[[], object]

# Far larger than any cache.
PROBED_BYTES = 512 << 20
# Another library's threads look for work for milliseconds after they had some.
PAUSE_S = 0.004
FEWEST_RUNS = 2
ROUNDS = 1 << 20
MOST_CALLS = 20_000


class Pace(msgspec.Struct, frozen=True):
    """How long is measured: `repeats` alternating runs of about `run_s`, until a way has used up
    `patience_s` (but FEWEST_RUNS of it, where one takes no longer)."""

    repeats: int
    run_s: float
    patience_s: float


class Limits(msgspec.Struct, frozen=True):
    """Read bandwidth and multiply-adds of all threads together: of float32, and of pairs of bf16,
    which are as many where the processor has no instructions for them."""

    read_gb_per_s: float
    gflop_per_s: float
    pair_gflop_per_s: float = 0.0

    def of_pairs(self) -> "Limits":
        """Return the limits of what multiplies bf16 with bf16."""
        return msgspec.structs.replace(self, gflop_per_s=self.pair_gflop_per_s)

    def seconds(self, read_bytes: float, flops: float) -> float:
        """Return the least seconds of so much work."""
        return max(read_bytes / self.read_gb_per_s, flops / self.gflop_per_s) / 1e9

    def is_bound_by_memory(self, read_bytes: float, flops: float) -> bool:
        """Whether reading takes longer than computing."""
        return read_bytes / self.read_gb_per_s >= flops / self.gflop_per_s


class LimitProbe:
    """Measures the limits again and again, for others may disturb a look: the best one counts.

    Reads memory from end to end on every thread, and multiplies and adds in registers. What memory
    gives differs by half from one second to the next where others share it, as on rented machines:
    what is bound by it is held against `read`s that alternate with it.
    """

    def __init__(self, threads: int, pace: Pace, size_bytes: int = PROBED_BYTES) -> None:
        """Look a first time."""
        self.threads = threads
        self._pool = _native.ThreadPool(threads)
        self._pace, self._arena = pace, Arena(size_bytes)
        self._best = Limits(0.0, 0.0, 0.0)
        self._started_s = time.perf_counter()
        self._busy_s = busy_seconds() - own_seconds()
        self.look()

    def look(self) -> None:
        """Measure once more."""
        flops = _native.multiply_add(self._pool, ROUNDS)
        pair_flops = _native.multiply_add_pairs(self._pool, ROUNDS)
        ways: dict[str, Run] = {
            "read": self.read,
            "compute": lambda: _native.multiply_add(self._pool, ROUNDS),
            "pairs": lambda: _native.multiply_add_pairs(self._pool, ROUNDS),
        }
        seconds = alternate(ways, self._pace)
        self._best = Limits(
            max(self._best.read_gb_per_s, self.size_bytes / seconds["read"] / GB),
            max(self._best.gflop_per_s, flops / seconds["compute"] / 1e9),
            max(self._best.pair_gflop_per_s, pair_flops / seconds["pairs"] / 1e9),
        )

    @property
    def size_bytes(self) -> int:
        """What a `read` reads."""
        return self._arena.capacity_bytes

    def read(self) -> None:
        """Read the memory once."""
        _native.read_words(self._pool, self._arena.address, self.size_bytes)

    def limits(self) -> Limits:
        """Look a last time and return the best."""
        self.look()
        return self._best

    def rows(self) -> list[Row]:
        """Return the limits as rows, and how many processors others have used meanwhile."""
        told = f"{self.threads} thread{'s' * (self.threads > 1)}"
        others_s = busy_seconds() - own_seconds() - self._busy_s
        others = max(0.0, others_s) / (time.perf_counter() - self._started_s)
        return [
            Row(case=f"limit: reading, {told}", unit="GB/s", ours=self._best.read_gb_per_s),
            Row(case=f"limit: multiply-adds, {told}", unit="GFLOP/s", ours=self._best.gflop_per_s),
            Row(
                case=f"limit: multiply-adds of bf16 pairs, {told}",
                unit="GFLOP/s",
                ours=self._best.pair_gflop_per_s,
            ),
            Row(case="used by others meanwhile", unit="processors", ours=others),
        ]


def own_seconds() -> float:
    """Return the processor seconds of this process and of those that it has started and awaited."""
    return sum(os.times()[:4])


def alternate(ways: Mapping[str, Run], pace: Pace) -> dict[str, float]:
    """Return the median seconds of a call of each way, runs alternating."""
    calls = {name: _calls_in(way, pace.run_s) for name, way in ways.items()}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(pace.repeats):
        for name, way in ways.items():
            spent_s = calls[name] * sum(taken[name])
            is_slow = calls[name] == 1 and spent_s > pace.patience_s
            if is_slow or (spent_s > pace.patience_s and len(taken[name]) >= FEWEST_RUNS):
                continue
            time.sleep(PAUSE_S)
            taken[name].append(_run(way, calls[name]) / calls[name])
    return {name: median(times) for name, times in taken.items()}


def _calls_in(way: Run, run_s: float) -> int:
    """Return about how many calls take `run_s`. The first call is not counted: it warms up."""
    way()
    calls = 1
    while (took_s := _run(way, calls)) < run_s / 4 and calls < MOST_CALLS:
        calls *= 4
    return max(1, min(MOST_CALLS, round(calls * run_s / took_s)))


def _run(way: Run, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        way()
    return time.perf_counter() - start
