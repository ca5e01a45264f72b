#!/usr/bin/env python3
"""Switching: cold loads against other libraries and the disk, warm switches, and a staged device's
copies of weights and KV against its link, alone and beside compute.

With --device cuda:0: warm switches there, and the same copies against torch's of page-locked
memory.
"""

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median, quantiles

import msgspec

# Started by its path, Python looks beside this file and not in the root of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aegaeon.config import Settings
from aegaeon.memory.budget import GB
from aegaeon.models.references import resolve_all
from aegaeon.types import ModelSpec
from benchmark.cold_loads import BareReads, Load, OurLoad, drop_from_page_cache, peers
from benchmark.device_limits import add_device_flag, check_device, link_gb_per_s
from benchmark.kv_pool import measure_speed
from benchmark.random_model import QWEN3_06B, SMALL, WIDE_KV, write_model
from benchmark.report_rows import Aim, Row, measured, progress, publish
from benchmark.staged_switches import (
    Link,
    Specs,
    cuda_link,
    measure_on,
    measure_staged,
    settings_for,
)
from benchmark.switch_engine import Driver, first_operator, region_of

READ_THREADS, READ_CHUNKS = (4, 8, 16), (2 << 20, 8 << 20)
# What a run has freed, a virtual machine gives back to its host seconds later: no run is to pay
# for the one before.
SETTLE_S = 5.0
PROMPT_TOKENS = 64
WARM_KV_GB = 0.5
WITHIN_15 = 1 / 1.15


class Scale(msgspec.Struct, frozen=True):
    """How much is measured."""

    repeats: int
    peer_repeats: int
    switches: int
    allocations: int
    sizes: dict[str, dict[str, int]]


LONG = {"large": QWEN3_06B, "middle": QWEN3_06B | {"vocab_size": 32_000, "num_hidden_layers": 8}}
SHORT = {"large": SMALL | {"num_hidden_layers": 8}, "middle": SMALL}
EVERYWHERE = {"small": SMALL, "wide-a": WIDE_KV, "wide-b": WIDE_KV}


def write_models(directory: Path, sizes: dict[str, dict[str, int]]) -> Specs:
    """Write the models and return what is served."""
    for seed, (name, size) in enumerate(sizes.items()):
        progress(f"writing {name}")
        write_model(directory / name, size, seed)
    return {spec.id: spec for spec in resolve_all(map(str, map(directory.joinpath, sizes)), "")}


# Cold


def settled(way: Load, path: Path) -> float:
    """Return the seconds that `way` takes from the disk, on a machine that has come to rest."""
    drop_from_page_cache(path)
    if isinstance(way, OurLoad):
        way.make_ready()
    time.sleep(SETTLE_S)
    return way()


def median_cold(ways: dict[str, Load], path: Path, repeats: dict[str, int]) -> dict[str, float]:
    """Return the median seconds of each way, runs alternating, each from the disk."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(max(repeats.values())):
        for name, way in ways.items():
            if run < repeats[name]:
                taken[name].append(settled(way, path))
                progress(f"  {name}: {taken[name][-1]:.3f} s")
    return {name: median(times) for name, times in taken.items()}


def best_reads(path: Path) -> list[BareReads]:
    """Return the three reads that take least, of two runs each."""
    tried = [BareReads(path, *how) for how in itertools.product(READ_THREADS, READ_CHUNKS)]
    times = median_cold({one.name: one for one in tried}, path, {one.name: 2 for one in tried})
    return sorted(tried, key=lambda one: times[one.name])[:3]


def measure_cold(spec: ModelSpec, scale: Scale) -> list[Row]:
    """GB/s of a file's bytes, from the disk until all are in memory."""
    path = Path(spec.path) / "model.safetensors"
    progress("bare reads")
    bare = best_reads(path)
    others, missing = peers(path)
    for name in missing:
        progress(f"{name} is not installed and is skipped")
    ours = OurLoad(spec, region_of("weights"))
    names = [one.name for one in bare]
    progress(f"cold loads; the limit is the best of {', '.join(names)}")
    unready = OurLoad(spec, region_of("weights"), is_ready=False)
    ways: dict[str, Load] = {"ours": ours, **{one.name: one for one in bare}, "unready": unready}
    ways |= others
    repeats = dict.fromkeys(ways, scale.repeats) | dict.fromkeys(others, scale.peer_repeats)
    times = median_cold(ways, path, repeats)
    file_gb = path.stat().st_size / GB
    rate = {name: file_gb / took_s for name, took_s in times.items()}
    limit = max(rate[name] for name in names)
    row = Row(case=f"cold load, {file_gb:.1f} GB", unit="GB/s", ours=rate["ours"], limit=limit)
    rows = [measured(row, Aim("ratio_to_limit", 0.95, ">= 95 % of bare reads"))]
    at_once = f"{row.case}, at once: no memory was made ready"
    rows.append(measured(msgspec.structs.replace(row, case=at_once, ours=rate["unready"])))
    for name in others:
        against = msgspec.structs.replace(row, peer=name, peer_value=rate[name])
        rows.append(measured(against, Aim("ratio_to_peer", 1.3, ">= 1.3x")))
    return rows


def measure_first_token(spec: ModelSpec, scale: Scale) -> list[Row]:
    """Seconds from a load's start to the first token of a prompt, with nothing in memory."""
    progress("cold first token")
    path = Path(spec.path) / "model.safetensors"
    alone = OurLoad(spec, region_of("weights"))
    runs: list[tuple[float, float]] = []
    for _ in range(scale.repeats):
        load_s = settled(alone, path)
        drop_from_page_cache(path)
        with Driver(cpu_settings((spec,)), (spec,)) as driver:
            driver.await_memory(spec.weight_bytes)
            time.sleep(SETTLE_S)
            start = time.perf_counter()
            driver.load(spec.id)
            driver.switch(spec.id)
            driver.prefill(spec.id, driver.submit(spec.id, PROMPT_TOKENS, 8))
            took_s = time.perf_counter() - start
            prefill_s = driver.prefill(spec.id, driver.submit(spec.id, PROMPT_TOKENS, 8))
        layers = layer_count(spec)
        runs.append((took_s, max(load_s, prefill_s) * (1 + 1 / layers)))
        progress(f"  {took_s:.3f} s; load {load_s:.3f} s, prefill {prefill_s:.3f} s")
    row = Row(
        case=f"cold first token, prompt of {PROMPT_TOKENS}",
        unit="s",
        ours=median(took_s for took_s, _ in runs),
        limit=median(limit_s for _, limit_s in runs),
    )
    aim = Aim("ratio_to_limit", WITHIN_15, "within 15 % of load or prefill")
    return [measured(row, aim, less_is_better=True)]


def layer_count(spec: ModelSpec) -> int:
    """Return the layers of a model."""
    config = msgspec.json.decode((Path(spec.path) / "config.json").read_bytes())
    return int(config["num_hidden_layers"])


# Warm


def cpu_settings(specs: Sequence[ModelSpec]) -> Settings:
    """Return settings with room for `specs`."""
    return Settings(
        device="cpu",
        colocated_count=1,
        model_cache_budget_gb=(sum(spec.weight_bytes for spec in specs) + (4 << 20)) / GB,
        kv_budget_gb=WARM_KV_GB,
    )


def measure_warm(specs: Specs, scale: Scale, link: Link | None = None) -> list[Row]:
    """Milliseconds from the order to switch to the first operator of the next step, on the CPU or
    the device behind `link`."""
    progress("warm switches")
    names = ("small", "large")
    chosen = [specs[name] for name in names]
    taken: dict[str, list[float]] = {name: [] for name in names}
    settings = settings_for(chosen, link, WARM_KV_GB) if link else cpu_settings(chosen)
    device = settings.device
    with Driver(settings, chosen) as driver, first_operator(device) as operator:
        requests = {}
        for name in names:
            driver.load(name)
            requests[name] = driver.submit(name, 16, scale.switches + 8)
            driver.prefill(name, requests[name])
        for _, name in itertools.product(range(scale.switches), names):
            start = time.perf_counter()
            driver.switch(name)
            driver.decode(name, requests[name])
            taken[name].append(1e3 * (operator.began_s - start))
    return list(warm_rows(taken, device))


def warm_rows(taken: dict[str, list[float]], device: str) -> Iterator[Row]:
    """Yield p50 and p99 of each model's milliseconds."""
    for name, times in taken.items():
        cuts = quantiles(times, n=100, method="inclusive")
        for percentile, bound in ((50, 0.5), (99, 2.0)):
            case = f"warm switch on {device}, {name} model, p{percentile}"
            aim = Aim("ours", bound, f"< {bound:g} ms", is_least=False)
            yield measured(Row(case=case, unit="ms", ours=cuts[percentile - 1]), aim)


def measure_device(specs: Specs, scale: Scale, device: str) -> list[Row]:
    """All rows of a CUDA device, whose link is what torch makes of it."""
    progress("the link, by torch")
    link = cuda_link(device, link_gb_per_s(int(device.partition(":")[2])))
    told = f"limit: torch's copies of page-locked memory to {device}"
    rows = [Row(case=told, unit="GB/s", ours=link.gb_per_s)]
    return rows + measure_warm(specs, scale, link) + measure_on(specs, link, scale.repeats)


def measure_host(specs: Specs, scale: Scale) -> list[Row]:
    """All rows of the CPU, and of the device that it stands in for."""
    rows = measure_cold(specs["large"], scale)
    rows += measure_first_token(specs["large"], scale)
    rows += measure_warm(specs, scale)
    rows += measure_staged(specs, scale.repeats)
    return rows + measure_speed(scale.repeats, scale.allocations)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--quick", action="store_true", help="a look that it works, some seconds")
    parser.add_argument("--repeats", type=int, default=5, help="alternating runs of each")
    parser.add_argument("--dir", help="where the models are written (default: the system's)")
    add_device_flag(parser)
    options = parser.parse_args(arguments)
    check_device(options.device)
    scale = Scale(options.repeats, 2, 200, 3_000, LONG | EVERYWHERE)
    if options.quick:
        scale = Scale(1, 1, 5, 200, SHORT | EVERYWHERE)
    with tempfile.TemporaryDirectory(prefix="aegaeon-switch-", dir=options.dir) as directory:
        specs = write_models(Path(directory), scale.sizes)
        if options.device == "cpu":
            rows = measure_host(specs, scale)
        else:
            rows = measure_device(specs, scale, options.device)
    publish("switching", rows, options.json)


if __name__ == "__main__":
    main()
