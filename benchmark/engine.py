#!/usr/bin/env python3
"""Tokens/s of the engine as instances run it, against what the machine can do and against peers.

Prefill is the time of a prompt's first token; decode that of a step of a batch, whose sequences
hold random keys and values: computing them would take minutes. Weights are those of the file with
float32 activations (bf16) and with activations that are rounded as well (bf16 x bf16, which is what
llama.cpp does), and int8. The ceiling of a case is what it must read (weights once, KV) at the read
bandwidth, or what it must compute at the multiply-add peak, whichever takes longer; both are
measured in the same run, reading between the runs of each case.

Peers run beside ours, in alternating runs: transformers (the faster of fp32 and bf16) where it is
installed, and llama.cpp where llama-bench and llama-batched-bench are on PATH and a GGUF file of
the same shape is named. Figures are medians.

  benchmark/engine.py                               a random model of Qwen3-0.6B's shape
  benchmark/engine.py --model DIR --json            a checkpoint of yours
  benchmark/engine.py --gguf bf16.gguf --gguf-int8 q8_0.gguf      against llama.cpp
  benchmark/engine.py --device cuda:0               on a GPU, against torch's copy and product
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median

# Started by its path, Python looks beside this file and not in the root of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import msgspec
import torch

from aegaeon.device.processors import available_processors
from aegaeon.memory.budget import GB
from aegaeon.types import ModelSpec
from benchmark.device_limits import DeviceProbe, add_device_flag, check_device
from benchmark.engine_cases import (
    BF16_PAIRS,
    KINDS,
    SPARE_TOKENS,
    Case,
    Compute,
    OurEngine,
    cases_of,
    ceiling,
    spec_of,
    work_of,
)
from benchmark.engine_peers import LLAMA, Peer, find_llama, find_transformers
from benchmark.limits import PAUSE_S, LimitProbe, Limits, Pace
from benchmark.random_model import QWEN3_06B, SMALL, write_model
from benchmark.report_rows import Aim, Row, measured, progress, publish

Way = Callable[[], float | None]
Probe = LimitProbe | DeviceProbe
UNIT = "tokens/s"
READ = "read"
PATIENCE_S = 15.0  # of one case, after which a way has run often enough
# Weights of this many bytes take so little time that what is around them shows.
SMALL_BYTES = 500_000_000
# Of ceilings, by kind and case; and of llama.cpp.
CEILING_AIMS = {
    ("bf16", "decode", 1): 0.85,
    (BF16_PAIRS, "decode", 1): 0.85,
    ("int8", "decode", 1): 0.80,
}
PREFILL_AIMS = {("bf16", 512): 0.75}
LLAMA_AIMS = {
    (BF16_PAIRS, "decode", 1): 1.5,
    ("int8", "decode", 1): 1.5,
    (BF16_PAIRS, "decode", 8): 1.5,
    ("int8", "decode", 8): 1.5,
    (BF16_PAIRS, "prefill", 1): 1.5,
    ("int8", "prefill", 1): 1.6,
}
TRANSFORMERS_AIMS = {"decode": 3.0, "prefill": 1.2}
READS = 4  # of the probe between two runs
BATCH_AIM = 5.0  # tokens/s of batch 8 to those of one


class Effort(msgspec.Struct, frozen=True):
    """How much is measured: `repeats` alternating runs, ours of about `run_s`, so long after the
    load that what a server does with its weights while nobody waits is done."""

    repeats: int
    run_s: float
    compute: Compute
    settle_s: float


def ceiling_aim(kind: str, case: Case, spec: ModelSpec) -> Aim | None:
    """Return what of its ceiling the case should reach."""
    share = PREFILL_AIMS.get((kind, case.tokens)) if case.kind == "prefill" else None
    if case.kind == "decode" and case.tokens <= 16:
        share = CEILING_AIMS.get((kind, case.kind, case.batch))
        if share is not None and spec.weight_bytes < SMALL_BYTES:
            share = 0.70
    return None if share is None else Aim("ratio_to_limit", share, f">= {share:.0%} of ceiling")


def peer_aim(kind: str, case: Case, peer: str) -> Aim | None:
    """Return how many times the peer's tokens/s ours should be."""
    if peer == LLAMA:
        times = LLAMA_AIMS.get((kind, case.kind, case.batch))
        times = times if case.kind == "decode" or case.tokens == 512 else None
    else:
        times = TRANSFORMERS_AIMS[case.kind]
    return None if times is None else Aim("ratio_to_peer", times, f">= {times:g}x")


def alternate_rates(ways: Mapping[str, Way], repeats: int) -> dict[str, float]:
    """Return the median rate of each way that has one, runs alternating; a way that has used up its
    patience runs no more."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    spent_s = dict.fromkeys(ways, 0.0)
    for _ in range(repeats):
        for name, way in ways.items():
            if spent_s[name] > PATIENCE_S:
                continue
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            rate = way()
            spent_s[name] += time.perf_counter() - start
            if rate is not None:
                rates[name].append(rate)
    return {name: median(some) for name, some in rates.items() if some}


def read_rate(probe: Probe) -> float:
    """Return the GB/s of a few reads."""
    start = time.perf_counter()
    for _ in range(READS):
        probe.read()
    return READS * probe.size_bytes / (time.perf_counter() - start) / 1e9


class Bench:
    """Measures a model as one kind."""

    def __init__(self, spec: ModelSpec, kind: str, effort: Effort) -> None:
        self._spec, self._kind, self._effort = spec, kind, effort
        self.skipped: list[str] = []
        self._ours: dict[Case, float] = {}
        self._peers: dict[Case, dict[str, float]] = {}
        self._read_gb_per_s: dict[Case, float] = {}

    def measure(self, cases: Sequence[Case], peers: Sequence[Peer], probe: Probe) -> None:
        """Measure all cases that fit memory, and what memory gives meanwhile."""
        fitting = self._fitting(cases)
        kv_bytes = max(case.kv_bytes(self._spec) for case in fitting) + (64 << 20)
        engine = OurEngine(self._spec, self._kind, self._effort.compute, kv_bytes)
        try:
            time.sleep(self._effort.settle_s)
            for case in fitting:
                self._case(engine, case, peers, probe)
        finally:
            engine.close()

    def rows(self, limits: Limits) -> list[Row]:
        """Return the rows of what was measured."""
        rows = [row for case in self._ours for row in self._rows(case, limits)]
        return rows + list(self._batch_rows())

    def _fitting(self, cases: Sequence[Case]) -> list[Case]:
        bound = self._effort.compute.kv_bound_bytes()
        fitting = []
        for case in cases:
            need, told = case.kv_bytes(self._spec), f"{self._kind}, {case.name}"
            if case.tokens + 64 > self._spec.context_tokens:
                has = self._spec.context_tokens
                self.skipped.append(f"{told}: the model's context has {has} tokens")
            elif need > bound:
                self.skipped.append(
                    f"{told}: its KV takes {need / GB:.1f} GB, {bound / GB:.1f} are to be had"
                )
            else:
                fitting.append(case)
        return fitting

    def _case(self, engine: OurEngine, case: Case, peers: Sequence[Peer], probe: Probe) -> None:
        engine.prepare(case)
        engine.seconds(case)  # a step before, which warms up
        ways: dict[str, Way] = {"ours": lambda: self._rate(engine, case)}
        ways |= {peer.name: partial(peer.tokens_per_s, case) for peer in peers}
        ways[READ] = lambda: read_rate(probe)
        rates = alternate_rates(ways, self._effort.repeats)
        self._ours[case], self._read_gb_per_s[case] = rates.pop("ours"), rates.pop(READ)
        told = ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
        progress(f"  {self._kind}, {case.name}: {self._ours[case]:.1f} {UNIT} ({told})")
        self._peers[case] = rates

    def _rate(self, engine: OurEngine, case: Case) -> float:
        """Return the tokens/s of a run: one prompt, or as many steps as fill it."""
        if case.kind == "prefill":
            return case.tokens / engine.seconds(case)
        took: list[float] = []
        # Sequences grow by a token a step, and have room for so many.
        most = SPARE_TOKENS // (self._effort.repeats + 1) - 1
        while not took or (sum(took) < self._effort.run_s and len(took) < most):
            took.append(engine.seconds(case))
        return case.batch / median(took)

    def _rows(self, case: Case, limits: Limits) -> Iterator[Row]:
        limits = msgspec.structs.replace(limits, read_gb_per_s=self._read_gb_per_s[case])
        if self._kind == BF16_PAIRS:
            limits = limits.of_pairs()
        row = Row(
            case=f"{self._kind}, {case.name}",
            unit=UNIT,
            ours=self._ours[case],
            limit=ceiling(case, self._spec, limits),
        )
        is_cpu = self._effort.compute.device == "cpu"
        yield measured(row, ceiling_aim(self._kind, case, self._spec) if is_cpu else None)
        if not is_cpu:
            yield self._used(case, limits)
        for name, rate in self._peers[case].items():
            against = msgspec.structs.replace(row, peer=name, peer_value=rate)
            yield measured(against, peer_aim(self._kind, case, name))

    def _used(self, case: Case, limits: Limits) -> Row:
        """Return what the case makes of whichever limit binds it."""
        work, name = work_of(case, self._spec), f"{self._kind}, {case.name}"
        runs = self._ours[case] / (case.tokens if case.kind == "prefill" else case.batch) / 1e9
        row = Row(case=f"{name}: read", unit="GB/s", ours=runs * work.read_bytes)
        limit = limits.read_gb_per_s
        if not limits.is_bound_by_memory(work.read_bytes, work.flops):
            row = Row(case=f"{name}: computed", unit="GFLOP/s", ours=runs * work.flops)
            limit = limits.gflop_per_s
        return measured(msgspec.structs.replace(row, limit=limit))

    def _batch_rows(self) -> Iterator[Row]:
        """Yield how much more a batch of 8 makes than one sequence."""
        for case, rate in self._ours.items():
            alone = self._ours.get(msgspec.structs.replace(case, batch=1))
            if case.kind != "decode" or case.batch != 8 or alone is None:
                continue
            row = Row(case=f"{self._kind}, {case.name}, to batch 1", unit="x", ours=rate / alone)
            aim = None
            if case.tokens <= 16 and self._effort.compute.device == "cpu":
                aim = Aim("ours", BATCH_AIM, f">= {BATCH_AIM:g}x")
            yield measured(row, aim)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a checkpoint's directory (default: a random one)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--quick", action="store_true", help="a look that it works, some seconds")
    parser.add_argument("--repeats", type=int, default=3, help="alternating runs of each")
    parser.add_argument("--threads", type=int, default=0, help="0: one for each processor")
    add_device_flag(parser)
    kinds = ", ".join(KINDS)
    told = f"what to measure, of {kinds} (default: all; {BF16_PAIRS}, the only one, on CUDA)"
    parser.add_argument("--kinds", help=told)
    parser.add_argument("--gguf", default="", help="the model in bf16 for llama.cpp")
    parser.add_argument("--gguf-int8", default="", help="the model in q8_0 for llama.cpp")
    parser.add_argument("--no-peers", action="store_true", help="measure ours alone")
    parser.add_argument("--dir", help="where a random model is written (default: the system's)")
    options = parser.parse_args(arguments)
    known = list(KINDS) if options.device == "cpu" else [BF16_PAIRS]
    options.kinds = options.kinds.split(",") if options.kinds else known
    if unknown := set(options.kinds) - set(known):
        parser.error(
            f"--kinds knows {', '.join(known)} on {options.device}, not {', '.join(unknown)}"
        )
    return options


def probe_of(compute: Compute, is_quick: bool) -> Probe:
    """Return what measures the limits of what computes."""
    pace = Pace(1, 0.001, 0.1) if is_quick else Pace(5, 0.05, 2.0)
    if compute.cuda_number is not None:
        return DeviceProbe(torch.device(compute.device), pace, (32 if is_quick else 1024) << 20)
    return LimitProbe(compute.threads, pace, (32 if is_quick else 512) << 20)


def measure(directory: str, options: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """Return rows of each kind, and what was skipped."""
    threads = options.threads or available_processors()
    effort = Effort(options.repeats, 0.5, Compute(threads, options.device), 5.0)
    if options.quick:
        effort = Effort(1, 0.0, effort.compute, 0.0)
    progress("limits")
    probe = probe_of(effort.compute, options.quick)
    benches: list[Bench] = []
    skipped: list[str] = []
    reference: list[Peer] = []
    has_peers = not options.no_peers and options.device == "cpu"
    if has_peers:
        reference, skipped = find_transformers(spec_of(directory, "bf16"), threads)
    elif options.device != "cpu":
        skipped = [f"{options.device}: peers, which compute on the CPU"]
    for kind in options.kinds:
        progress(kind)
        peers = list(reference)
        if has_peers:
            gguf = options.gguf_int8 if kind == "int8" else options.gguf
            found, missing = find_llama(gguf, threads)
            peers += found
            skipped += [f"{kind}, {text}" for text in missing]
        benches.append(Bench(spec_of(directory, kind), kind, effort))
        benches[-1].measure(list(cases_of(options.quick)), peers, probe)
        skipped += benches[-1].skipped
        probe.look()
    limits = probe.limits()
    return probe.rows() + [row for bench in benches for row in bench.rows(limits)], skipped


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and publish."""
    options = parse(arguments)
    check_device(options.device)
    with tempfile.TemporaryDirectory(prefix="aegaeon-engine-", dir=options.dir) as directory:
        model = options.model
        if model is None:
            progress("writing a random model")
            model = str(Path(directory) / "random")
            write_model(Path(model), SMALL if options.quick else QWEN3_06B)
        rows, skipped = measure(model, options)
    publish(f"engine, {Path(model).name}", rows, options.json, skipped)


if __name__ == "__main__":
    main()
