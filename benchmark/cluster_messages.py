#!/usr/bin/env python3
"""Messages between two nodes across their store: mailboxes in Redis against redis-py's bare verbs.

A redis-server of its own is started, on TCP as nodes reach it, or --redis-url names one. Runs of
all ways alternate, and medians of runs are told; the limit is a bare socket between the two
processes, which has one hop where all others have two.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median, quantiles
from time import sleep

# Started by its path, Python looks beside this file and not in the root of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aegaeon.errors import AegaeonError
from aegaeon.flags import Parser
from benchmark.message_ways import OURS, SOCKET, WAYS, Pair
from benchmark.redis_peer import own_redis
from benchmark.report_rows import Aim, Row, measured, progress, publish

RECORD_BYTES = 256  # about what a token takes, or some joined
GAP_S = 0.002  # between records whose times are taken
CASES = ("one way", "there and back")
# Of one run: so many that it takes some tenths of a second.
PINGS = 300
FLOODS = {"256 B": (RECORD_BYTES, 2000), "64 KiB": (64 << 10, 300)}
LATENCY_AIM = Aim("ratio_to_peer", 0.5, ">= 0.5x of bare")
RATE_AIM = Aim("ratio_to_peer", 0.5, ">= 0.5x of bare")

Runs = dict[str, list[float]]


def latencies(pairs: dict[str, Pair], repeats: int, pings: int) -> Iterator[Row]:
    """Yield the times of records that come alone, one way and there and back."""
    runs: dict[tuple[str, int], Runs] = {}
    for repeat in range(repeats):
        progress(f"latency, run {repeat + 1} of {repeats}")
        for name, pair in pairs.items():
            taken = []
            for _ in range(pings):
                sleep(GAP_S)
                taken.append(pair.ping(RECORD_BYTES))
            for case, times in zip(CASES, zip(*taken, strict=True), strict=True):
                cuts = quantiles(times, n=100)
                for percentile in (50, 99):
                    run = runs.setdefault((case, percentile), {way: [] for way in pairs})
                    run[name].append(1e6 * cuts[percentile - 1])
    for (case, percentile), found in runs.items():
        yield from against(found, f"{case} p{percentile}, {RECORD_BYTES} B", "us", True)


def rates(pairs: dict[str, Pair], repeats: int, share: float) -> Iterator[Row]:
    """Yield how many records a second go through one after the other, each acknowledged."""
    for label, (size, most) in FLOODS.items():
        found: Runs = {name: [] for name in pairs}
        count = max(20, int(most * share))
        for repeat in range(repeats):
            progress(f"records/s at {label}, run {repeat + 1} of {repeats}")
            for name, pair in pairs.items():
                found[name].append(count / pair.flood_s(count, size))
        yield from against(found, f"records/s, {label}", "1/s", False)


def against(found: Runs, case: str, unit: str, less_is_better: bool) -> Iterator[Row]:
    """Yield ours against each of the others, with the socket as the limit."""
    value = {name: median(runs) for name, runs in found.items()}
    for peer in (name for name in value if name not in (OURS, SOCKET)):
        row = Row(
            case=case,
            unit=unit,
            ours=value[OURS],
            peer=peer,
            peer_value=value[peer],
            limit=value[SOCKET],
        )
        is_tail = "p99" in case  # of two processors that others use, too
        aim = None if is_tail else LATENCY_AIM if less_is_better else RATE_AIM
        yield measured(row, aim, less_is_better)


def measure(url: str, repeats: int, is_quick: bool) -> list[Row]:
    """Return all rows."""
    repeats, share = (1, 0.02) if is_quick else (repeats, 1.0)
    with contextlib.ExitStack() as stack:
        pairs = {}
        for number, name in enumerate(WAYS):
            pairs[name] = Pair(name, url, f"messages-{os.getpid()}-{number}")
            stack.callback(pairs[name].close)
        rows = [*latencies(pairs, repeats, max(20, int(PINGS * share)))]
        return [*rows, *rates(pairs, repeats, share)]


def make_parser() -> Parser:
    """Return the parser of the flags."""
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--quick", action="store_true", help="a look that it works, some seconds")
    parser.add_argument("--repeats", type=int, default=5, help="alternating runs of each")
    parser.add_argument("--redis-url", help="this server instead of one of our own")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and publish; return the exit code."""
    options = make_parser().parse_args(arguments)
    try:
        with contextlib.ExitStack() as stack:
            url = options.redis_url or stack.enter_context(own_redis(is_tcp=True))
            if url is None:
                publish("messages across the store", [], options.json, ["no redis-server is here"])
                return 0
            rows = measure(url, options.repeats, options.quick)
    except AegaeonError as error:
        print(f"cluster_messages.py: error: {error}", file=sys.stderr)
        return 2
    publish("messages across the store", rows, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
