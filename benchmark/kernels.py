#!/usr/bin/env python3
"""Each CPU operator against what processor and memory can do, and against torch.

The limits are measured in the same run, with as many threads: reading 512 MB from end to end, in
turn with each case that reads much, and multiply-adds in registers. An operator's bytes are those
that it must read (weights, keys and values, operands), its FLOPs those of the formula. Whichever
takes longer at the limits binds it: the table shows GB/s of what memory binds, else GFLOP/s; JSON
has both. Weights and KV are so many copies that no cache holds them; small operands lie in caches,
so their GB/s may exceed memory's.

Torch has the same type, shape and threads. Figures are medians of alternating runs; Python's own
microsecond or two per call is in ours and in torch's.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# Started by its path, Python looks beside this file and not in the root of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import msgspec
import torch

from aegaeon import _native
from aegaeon.device.processors import available_processors
from benchmark import kernel_cases as cases
from benchmark.limits import LimitProbe, Limits, Pace, alternate
from benchmark.random_model import SMALL
from benchmark.report_rows import Aim, Row, measured, progress, publish
from benchmark.sampling_cases import pool_cases, sampling_cases

Maker = Callable[[_native.ThreadPool, cases.Scale], Iterator[cases.Case]]
KINDS: dict[str, Maker] = {
    "pool": pool_cases,
    "rows": cases.row_cases,
    "attention": cases.attention_cases,
    "sampling": sampling_cases,
    "linear": cases.linear_cases,
}
PEER = "torch"
READ = "read"
PAIRS = " x bf16"  # in names of products of bf16 with bf16
MUCH_BYTES = 1 << 20  # of a case; less lies in caches
FULL = cases.Scale(
    cases.QWEN3,
    cases.COLD_BYTES,
    cases.LINEAR_ROWS,
    cases.FEW_ROWS,
    cases.DECODE_CONTEXTS,
    cases.PREFILL_CONTEXTS,
)
QUICK = cases.Scale(cases.sizes_of(SMALL), 4 << 20, (1, 5), (1, 3), (40,), (33,))


class Result:
    """Seconds of a call of one case, or of several that belong together."""

    def __init__(self, name: str, items: int = 0) -> None:
        self.name, self.items = name, items
        self.read_bytes = self.flops = self.ours_s = self.torchs_s = self.read_s = 0.0

    def add(self, case: cases.Case, seconds: dict[str, float]) -> None:
        """Count a case in."""
        self.read_bytes += case.read_bytes
        self.flops += case.flops
        self.ours_s += seconds["ours"]
        self.torchs_s += seconds.get(PEER, 0.0)
        self.read_s += seconds.get(READ, 0.0)

    def rows(self, limits: Limits) -> list[Row]:
        """Return the rows of what was measured, the one that binds first."""
        if PAIRS in self.name:
            limits = limits.of_pairs()
        if self.read_s:
            read_gb_per_s = self.read_bytes / self.read_s / 1e9
            limits = msgspec.structs.replace(limits, read_gb_per_s=read_gb_per_s)
        return [self._item_row(limits)] if self.items else list(self._rate_rows(limits))

    def _rate_rows(self, limits: Limits) -> Iterator[Row]:
        """Yield GB/s and GFLOP/s, what binds first."""
        amounts = {"GB/s": (self.read_bytes, limits.read_gb_per_s)}
        if self.flops:
            amounts["GFLOP/s"] = (self.flops, limits.gflop_per_s)
        if not limits.is_bound_by_memory(self.read_bytes, self.flops):
            amounts = dict(reversed(amounts.items()))
        for unit, (amount, limit) in amounts.items():
            row = Row(
                case=self.name,
                unit=unit,
                ours=amount / self.ours_s / 1e9,
                peer=PEER if self.torchs_s else None,
                peer_value=amount / self.torchs_s / 1e9 if self.torchs_s else None,
                limit=limit,
            )
            yield measured(row, _rate_aim(self.name, unit))

    def _item_row(self, limits: Limits) -> Row:
        """Return microseconds of each of a call's items."""
        aim = None
        if self.name.startswith("fork"):
            aim = Aim("ours", 3.0, "< 3 us", is_least=False)
        elif self.name.startswith("sample") and self.items == 1:
            aim = Aim("ours", 300.0, "< 300 us", is_least=False)
        each = 1e6 / self.items
        row = Row(
            case=self.name,
            unit="us",
            ours=self.ours_s * each,
            peer=PEER if self.torchs_s else None,
            peer_value=self.torchs_s * each or None,
            limit=limits.seconds(self.read_bytes, self.flops) * each or None,
        )
        return measured(row, aim, less_is_better=True)


def _rate_aim(name: str, unit: str) -> Aim | None:
    """Return what the row should reach, of the limit."""
    aims = {
        ("linear bf16, a layer, 1 row", "GB/s"): 0.85,
        ("linear int8, a layer, 1 row", "GB/s"): 0.80,
        ("linear bf16, a layer, 512 rows", "GFLOP/s"): 0.75,
        ("linear bf16 x bf16, a layer, 1 row", "GB/s"): 0.85,
        ("linear bf16 x bf16, a layer, 512 rows", "GFLOP/s"): 0.75,
        (f"attention, decode at {cases.DECODE_CONTEXTS[-1]}", "GB/s"): 0.80,
    }
    share = aims.get((name, unit))
    return None if share is None else Aim("ratio_to_limit", share, f">= {share:.0%} of limit")


class Bench:
    """Measures cases of the chosen kinds."""

    def __init__(self, pool: _native.ThreadPool, pace: Pace, probe: LimitProbe) -> None:
        self._pool, self._pace, self._probe = pool, pace, probe
        self._results: list[Result] = []
        self._sums: dict[str, Result] = {}

    def measure(self, maker: Maker, scale: cases.Scale) -> None:
        """Measure all cases of one kind."""
        for case in maker(self._pool, scale):
            ways = {"ours": case.ours}
            if case.torchs is not None:
                ways[PEER] = case.torchs
            if case.read_bytes >= MUCH_BYTES:
                ways[READ] = self._probe.read
            seconds = alternate(ways, self._pace)
            if READ in seconds:  # as many bytes
                seconds[READ] *= case.read_bytes / self._probe.size_bytes
            progress(f"  {case.name}: {seconds['ours'] * 1e6:,.1f} us")
            self._results.append(Result(case.name, case.items))
            self._results[-1].add(case, seconds)
            if case.part:
                self._sums.setdefault(case.part, Result(case.part)).add(case, seconds)

    def rows(self, limits: Limits, only_binding: bool) -> list[Row]:
        """Return the rows of all cases, then of a layer's products together."""
        rows = [result.rows(limits) for result in (*self._results, *self._sums.values())]
        return [row for some in rows for row in (some[:1] if only_binding else some)]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--quick", action="store_true", help="a look that it works, some seconds")
    parser.add_argument("--repeats", type=int, default=5, help="alternating runs of each")
    parser.add_argument(
        "--only", default=",".join(KINDS), metavar="KINDS", help="what to measure: %(default)s"
    )
    parser.add_argument("--threads", type=int, default=0, help="0: one for each processor")
    parser.add_argument(
        "--instruction-set", default="best", help="best, baseline, avx2, avx512 and the like"
    )
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(KINDS):
        parser.error(f"--only knows {', '.join(KINDS)}, not {', '.join(sorted(unknown))}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and publish."""
    options = parse(arguments)
    threads = options.threads or available_processors()
    _native.force_isa(options.instruction_set)
    torch.set_num_threads(threads)
    pool = _native.ThreadPool(threads)
    pace = Pace(1, 0.001, 0.1) if options.quick else Pace(options.repeats, 0.02, 1.0)
    scale = QUICK if options.quick else FULL
    progress("limits")
    probe = LimitProbe(threads, pace, (32 if options.quick else 512) << 20)
    bench = Bench(pool, pace, probe)
    with torch.inference_mode():
        for kind, maker in KINDS.items():
            if kind in options.only:
                progress(kind)
                bench.measure(maker, scale)
                probe.look()
    rows = bench.rows(probe.limits(), only_binding=not options.json)
    publish(f"CPU operators, {_native.current_isa()}", probe.rows() + rows, options.json)


if __name__ == "__main__":
    main()
