#!/usr/bin/env python3
"""The copy engine against memcpy, the rate of its emulated link, and what a ticket costs."""

import argparse
import ctypes
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

# Started by its path, Python looks beside this file and not in the root of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from aegaeon._native import CopyEngine
from aegaeon.memory.arena import Arena
from benchmark.report_rows import Aim, Row, measured, progress, publish

MEMCPY, STREAM = "memcpy", "the slower of reading and writing"
THREADS = (1, 2)
LINK_GB_PER_S = (1.0, 4.0)
LINK_WINDOW_S = 0.05  # over which the rate must hold
TICKETS = 2000
PATIENCE_S = 60.0


class Pair:
    """Two arenas far larger than any cache, and ways from one to the other."""

    def __init__(self, size_bytes: int) -> None:
        """Touch both."""
        self.source, self.target = Arena(size_bytes), Arena(size_bytes)
        self.size_bytes = self.source.capacity_bytes

    def segment(self, size_bytes: int) -> tuple[int, int, int]:
        """Return the first bytes of the pair as a segment."""
        return self.target.address, self.source.address, size_bytes

    def copy(self, engine: CopyEngine, size_bytes: int) -> float:
        """Copy the first bytes by ticket; return the seconds until they are in."""
        start = time.perf_counter()
        if not engine.submit([self.segment(size_bytes)]).wait(timeout_s=PATIENCE_S):
            raise SystemExit(f"{size_bytes} bytes took more than {PATIENCE_S} s to copy")
        return time.perf_counter() - start

    def memcpy(self) -> float:
        """Return the seconds of one plain memcpy."""
        start = time.perf_counter()
        ctypes.memmove(*self.segment(self.size_bytes))
        return time.perf_counter() - start

    def read_or_write(self) -> float:
        """Return the seconds that one core takes to read all or to write all: the slower of both.

        No copy by one core is faster, since it does both.
        """
        source = np.frombuffer(self.source.view, np.uint64)
        start = time.perf_counter()
        source.max()
        middle = time.perf_counter()
        ctypes.memset(self.target.address, 1, self.size_bytes)
        return max(middle - start, time.perf_counter() - middle)


def measure_bandwidth(pair: Pair, repeats: int) -> list[Row]:
    """GB/s of long copies, all ways alternating."""
    progress("GB/s")
    engines = {threads: CopyEngine(threads) for threads in THREADS}
    ways: dict[str, Callable[[], float]] = {MEMCPY: pair.memcpy, STREAM: pair.read_or_write}
    for threads, engine in engines.items():
        ways[f"{threads}"] = partial(pair.copy, engine, pair.size_bytes)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            taken[name].append(way())
    for engine in engines.values():
        engine.close()
    rate = {name: pair.size_bytes / median(times) / 1e9 for name, times in taken.items()}
    return [
        measured(
            Row(
                case=f"copy, {threads} thread{'s' * (threads > 1)}",
                unit="GB/s",
                ours=rate[f"{threads}"],
                peer=MEMCPY,
                peer_value=rate[MEMCPY],
                limit=rate[STREAM],
            ),
            Aim("ratio_to_peer", 1.0, ">= memcpy"),
        )
        for threads in THREADS
    ]


def measure_link(pair: Pair, repeats: int) -> list[Row]:
    """GB/s over an emulated link, from submitting to the last byte; never above it."""
    rows = []
    for gb_per_s in LINK_GB_PER_S:
        progress(f"a link of {gb_per_s} GB/s")
        engine = CopyEngine(link_bytes_per_s=int(gb_per_s * 1e9))
        size_bytes = min(pair.size_bytes, int(gb_per_s * 1e9 * LINK_WINDOW_S))
        times = [pair.copy(engine, size_bytes) for _ in range(repeats)]
        engine.close()
        rows.append(
            measured(
                Row(
                    case=f"a link of {gb_per_s:g} GB/s, {LINK_WINDOW_S * 1e3:g} ms",
                    unit="GB/s",
                    ours=size_bytes / median(times) / 1e9,
                    limit=gb_per_s,
                ),
                Aim("ratio_to_limit", 0.98, "within 2 %"),
            )
        )
    return rows


def measure_tickets(pair: Pair, repeats: int) -> list[Row]:
    """What a ticket costs beside its bytes: submitted in a row, and one by one with a wait."""
    progress("us per ticket")
    engine = CopyEngine()
    segment = pair.segment(64)
    rows, in_a_row, alone = [], [], []
    for _ in range(repeats):
        start = time.perf_counter()
        tickets = [engine.submit([segment]) for _ in range(TICKETS)]
        tickets[-1].wait(timeout_s=PATIENCE_S)
        in_a_row.append((time.perf_counter() - start) / TICKETS * 1e6)
        alone.append(median(pair.copy(engine, 64) for _ in range(TICKETS)) * 1e6)
    engine.close()
    for case, times in (("ticket, in a row", in_a_row), ("ticket, from sleep", alone)):
        rows.append(measured(Row(case=case, unit="us", ours=median(times))))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--quick", action="store_true", help="a look that it works, a second")
    parser.add_argument("--repeats", type=int, default=11, help="alternating runs of each")
    options = parser.parse_args(arguments)
    repeats, size_bytes = (2, 64 << 20) if options.quick else (options.repeats, 512 << 20)
    pair = Pair(size_bytes)
    rows = measure_bandwidth(pair, repeats) + measure_link(pair, repeats)
    publish("copy engine", rows + measure_tickets(pair, repeats), options.json)


if __name__ == "__main__":
    main()
