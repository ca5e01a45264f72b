#!/usr/bin/env python3
"""Cost models: what this machine's prefills, decode steps, switches, loads and copies of keys and
values take, as linear models in one JSON file; and how far off their predictions are.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import get_args

import msgspec

# Started by its path, Python looks beside this file and not in the root of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aegaeon.config import ActivationDtype, KvDtype, Settings, check_settings
from aegaeon.device.processors import compute_threads
from aegaeon.engine.engine import AT_REST_S
from aegaeon.errors import AegaeonError
from aegaeon.memory.budget import GB, choose_budgets
from aegaeon.models.references import resolve_all
from aegaeon.scheduler.cost import Costs, ModelCost
from aegaeon.scheduler.refine import guessed_cost
from aegaeon.types import ModelSpec, Quantize
from benchmark.calibration_copies import Copies, measure_copies
from benchmark.calibration_fit import (
    Kind,
    Sample,
    Step,
    error_rows,
    errors,
    fit,
    replay,
)
from benchmark.calibration_runs import (
    MOST_GROWN,
    Bench,
    Meter,
    Run,
    Scale,
    any_prompts,
    batch_lengths,
    measure,
    prompts,
)
from benchmark.report_rows import Row, measured, progress, publish, this_machine
from benchmark.switch_engine import Driver

KINDS: tuple[Kind, ...] = ("prefill", "decode")
REFINED = "refined"
SWITCHES, SWITCHED_TOKENS = 9, 32
LEARNED = 30  # actions, after which a guess is to have become a cost model
QUICK = Scale(
    longest=64,
    max_batch=3,
    rounds=1,
    decodes=6,
    held_out=4,
    copies=2,
    steps=40,
    reading_s=0.02,
    patience_s=0.5,
)


class Measured(msgspec.Struct, frozen=True):
    """Of one model: its costs, the errors of what they say of other samples, a served sequence."""

    cost: ModelCost
    errors: dict[Kind, list[float]]
    steps: list[Step]


def engine_settings(device: Settings, specs: Sequence[ModelSpec], scale: Scale) -> Settings:
    """Return `device` with room for the weights of `specs` and what is measured of each."""
    tokens = scale.longest + sum(batch_lengths(scale)) + 2 * MOST_GROWN * scale.max_batch
    kv_gb = tokens * max(spec.kv_token_bytes for spec in specs) / GB
    weights_gb = (sum(spec.weight_bytes for spec in specs) + (1 << 21)) / GB
    return msgspec.structs.replace(
        device,
        model_cache_budget_gb=weights_gb,
        kv_budget_gb=kv_gb,
        device_memory_gb=weights_gb + kv_gb,
    )


def measure_model(bench: Bench, meter: Meter, scale: Scale, rng: random.Random) -> Measured:
    """Measure and fit one model; the first readings only warm it up."""
    bench.prefill((scale.longest // 2,))
    prefills = _prefills(bench, meter, scale, rng)
    decodes = _decodes(bench, meter, scale, rng)
    progress("  a served sequence")
    steps = list(bench.serve(scale, rng))
    prefill, decode = fit(prefills[0]), fit(decodes[0])
    spec = bench.spec
    cost = ModelCost(
        weight_gb=spec.weight_bytes / GB,
        kv_gb_per_token=spec.kv_token_bytes / GB,
        max_len=spec.context_tokens,
        prefill=(prefill[0], prefill[1], prefill[2]),
        decode=(decode[0], decode[1], decode[2]),
    )
    found: dict[Kind, list[float]] = {
        "prefill": errors(prefill, prefills[1]),
        "decode": errors(decode, decodes[1]),
    }
    return Measured(cost, found, steps)


def _prefills(
    bench: Bench, meter: Meter, scale: Scale, rng: random.Random
) -> tuple[list[Sample], list[Sample]]:
    """Return samples to fit, and to check."""
    most = min(scale.max_batch, 8)
    fitted = prompts(scale.longest, most)
    held_out = [any_prompts(scale.longest, most, rng) for _ in range(scale.held_out)]
    progress("  prefill")
    runs: list[Run] = [partial(bench.prefill, one) for one in fitted + held_out]
    samples = measure(meter, runs, scale.rounds, rng)
    return samples[: len(fitted)], samples[len(fitted) :]


def _decodes(
    bench: Bench, meter: Meter, scale: Scale, rng: random.Random
) -> tuple[list[Sample], list[Sample]]:
    """The same of decode: batches of all sizes, of sequences of all lengths."""
    lengths = batch_lengths(scale)
    sizes = [1 + index % scale.max_batch for index in range(scale.decodes)]
    sizes += [rng.randint(1, scale.max_batch) for _ in range(scale.held_out)]
    batches = [rng.sample(range(len(lengths)), size) for size in sizes]
    progress("  decode")
    runs: list[Run] = [partial(bench.decode_some, some, lengths) for some in batches]
    samples = measure(meter, runs, scale.rounds, rng)
    bench.let_go()
    return samples[: scale.decodes], samples[scale.decodes :]


def measure_switch(benches: Sequence[Bench]) -> float:
    """Return the middle seconds of switches between models that have a sequence each."""
    times = []
    for _ in range(SWITCHES):
        for bench in benches:
            times.append(bench.switch())
            bench.decode_some((0,), (SWITCHED_TOKENS,))
    return median(times)


def costs_of(
    device: Settings, specs: Sequence[ModelSpec], models: dict[str, ModelCost], copies: Copies
) -> Costs:
    """Put the file together, but for what a switch takes."""
    per_gb, fixed_s = copies.load
    is_staged = device.device == "staged"
    memory_gb = device.device_memory_gb
    if not memory_gb:
        budgets = choose_budgets(device, specs)
        memory_gb = (budgets.device_bytes or budgets.weight_bytes + budgets.kv_bytes) / GB
    return Costs(
        link_gb_per_s=1 / per_gb,
        device_memory_gb=memory_gb,
        models=models,
        model_mix=tuple(models),
        load_fixed_s=fixed_s,
        move_fixed_s=copies.move_fixed_s,
        is_kv_moved=is_staged,
        rest_s=AT_REST_S,
    )


def report(costs: Costs, models: Sequence[Measured], copies: Copies, threads: int) -> list[Row]:
    """Return the rows: errors of the models together, and of a sequence as it was served.

    Those that a thread's own clock has timed say so: they are not what a busy machine takes.
    """
    clock = ", thread's clock" if threads == 1 else ""
    rows = []
    for kind in KINDS:
        together = [error for one in models for error in one.errors[kind]]
        rows += error_rows(f"{kind}, held out{clock}", together)
    rows += error_rows("load, held out", errors(copies.load, copies.held_out_loads))
    line = (copies.load[0], costs.move_fixed_s)
    rows += error_rows("KV out and in, held out", errors(line, copies.held_out_moves))
    for kind in KINDS:
        for way, found in _served(models, kind).items():
            rows += error_rows(f"served {kind}, {way}", found, has_aim=way == REFINED)
    rows.append(measured(Row(case="link", unit="GB/s", ours=costs.link_gb_per_s)))
    rows.append(measured(Row(case="switch", unit="ms", ours=1e3 * costs.switch_s)))
    return rows


def _served(models: Sequence[Measured], kind: Kind) -> dict[str, list[float]]:
    """Return the errors of predicting each action of the served sequences, by ways to predict."""
    ways: dict[str, list[float]] = {"as fitted": [], REFINED: [], "refined from a guess": []}
    for one in models:
        cost = one.cost
        guess = guessed_cost(cost.weight_gb, cost.kv_gb_per_token, cost.max_len)
        fitted, refined = replay(cost, one.steps)
        learned = replay(guess, one.steps, is_measured=False)[1]
        skipped = sum(step.kind == kind for step in one.steps[:LEARNED])
        ways["as fitted"] += fitted[kind]
        ways[REFINED] += refined[kind]
        ways["refined from a guess"] += learned[kind][skipped:]
    return ways


def calibrate(
    device: Settings, specs: Sequence[ModelSpec], scale: Scale
) -> tuple[Costs, list[Row]]:
    """Measure everything and return what the file says, and the rows."""
    rng = random.Random(scale.steps)
    distinct: dict[str, Measured] = {}
    with Driver(engine_settings(device, specs, scale), specs) as driver:
        meter = Meter(device.threads_per_instance, scale)
        benches = []
        for spec in specs:
            if spec.path not in distinct:
                progress(spec.id)
                benches.append(Bench(driver, spec, device.threads_per_instance))
                distinct[spec.path] = measure_model(benches[-1], meter, scale, rng)
        switch_s = measure_switch(benches)
    progress("copies")
    copies = measure_copies(device, specs, scale)
    models = {
        spec.id: msgspec.structs.replace(
            distinct[spec.path].cost,
            quantize=spec.quantize,
            kv_dtype=device.stored_kv,
            activations=device.activations,
        )
        for spec in specs
    }
    costs = costs_of(device, specs, models, copies)
    costs = msgspec.structs.replace(costs, switch_s=switch_s)
    threads = device.threads_per_instance
    rows = report(costs, tuple(distinct.values()), copies, threads)
    disturbed = Row(
        case="readings that others disturbed", unit="%", ours=100 * meter.disturbed / meter.readings
    )
    return costs, [*rows, measured(disturbed)]


def settings_of(options: argparse.Namespace) -> Settings:
    """Return how the engine is opened. A staged device's copies have a processor of their own, as
    a device with memory of its own has an engine for them."""
    threads = options.threads_per_instance
    if not threads:
        threads = max(1, compute_threads(Settings()) - (options.device == "staged"))
    return check_settings(
        {
            "device": options.device,
            "colocated_count": 1,
            "threads_per_instance": threads,
            "link_gb_per_s": options.link_gb_per_s,
            "device_memory_gb": options.device_memory_gb,
            "kv_dtype": options.kv_dtype,
            "activation_dtype": options.activation_dtype,
        }
    )


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--models", required=True, help="what to measure, as `aegaeon serve` has it"
    )
    parser.add_argument("--models-dir", default="models", help="where the models are")
    parser.add_argument(
        "--quantize", choices=get_args(Quantize), default="none", help="as `aegaeon serve` has it"
    )
    parser.add_argument(
        "--kv-dtype", choices=get_args(KvDtype), default="auto", help="as `aegaeon serve` has it"
    )
    parser.add_argument(
        "--activation-dtype",
        choices=get_args(ActivationDtype),
        default="auto",
        help="as `aegaeon serve` has it",
    )
    parser.add_argument("--device", choices=("cpu", "staged"), default="cpu")
    parser.add_argument(
        "--link-gb-per-s", type=float, default=0.0, help="of a staged device (0: as memory goes)"
    )
    parser.add_argument(
        "--device-memory-gb", type=float, default=0.0, help="what the file says (0: as served)"
    )
    parser.add_argument(
        "--threads-per-instance", type=int, default=0, help="compute threads (0: as served)"
    )
    parser.add_argument(
        "--out", type=Path, help="where the file goes; live policies and the simulator read it"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--quick", action="store_true", help="a look that it works, some seconds")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the file and publish."""
    options = make_parser().parse_args(arguments)
    device = settings_of(options)
    try:
        specs = resolve_all(
            options.models.split(","), options.models_dir, options.kv_dtype, options.quantize
        )
        costs, rows = calibrate(device, specs, QUICK if options.quick else Scale())
    except AegaeonError as error:
        sys.exit(str(error))
    if options.out is not None:
        machine = this_machine()
        source = (
            f"benchmark/calibrate.py, {device.device} with {device.threads_per_instance} threads, "
            f"{machine.cpu}, {machine.processors} processors, --quantize {options.quantize} "
            f"--kv-dtype {device.stored_kv} --activation-dtype {device.activations}"
        )
        text = msgspec.json.encode({"source": source} | msgspec.to_builtins(costs))
        options.out.write_bytes(msgspec.json.format(text, indent=2) + b"\n")
    publish(f"cost models on {device.device}", rows, options.json)


if __name__ == "__main__":
    main()
