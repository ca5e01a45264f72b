#!/usr/bin/env python3
"""Live proof of the policies: one load to a real server under each, and what the simulator says.

Several copies of a model share devices with memory for two of them. Goodput is the highest rate at
which 90 % of the requests keep their targets. Tokens are timed where a client sees them.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Started by its path, Python looks beside this file and not in the root of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import msgspec

from aegaeon.errors import AegaeonError
from aegaeon.memory.budget import WEIGHT_SHARE
from aegaeon.metrics import Attainment, Served, Target, attainment, goodput
from aegaeon.scheduler.cost import Costs, decode_costs
from aegaeon.sim.workloads import Load, poisson
from benchmark.goodput_load import Health, replay
from benchmark.goodput_rows import Point, rows_of
from benchmark.goodput_simulated import predict, slowed, way_of
from benchmark.report_rows import progress, publish
from benchmark.serving import ServerError, running_server

EPILOG = """\
examples:
  calibrate.py --models-dir models --models a=SmolLM2-135M-Instruct --device staged --out costs.json
  goodput.py --models-dir models --costs costs.json --json
The policies alternate: every round serves the same loads under each. `paper` is run both with two
colocated instances and with one to prefill and one to decode (`paper-split`). With fewer --rates
and --rounds it is quicker and says less."""

POLICIES = ("slack", "paper", "paper-split", "request")
ALONE, PACED = "alone", "paced"  # with the costs as calibrated; with the pace that steps had


@dataclass(frozen=True)
class Setup:
    """What is served on what."""

    models_dir: Path
    reference: str
    copies: int
    memory_gb: float
    link_gb_per_s: float
    target: Target
    costs_file: Path
    costs: Costs

    @property
    def names(self) -> tuple[str, ...]:
        """What the copies are called."""
        return tuple(f"model-{number:04d}" for number in range(self.copies))

    def flags(self, policy: str) -> list[str]:
        """Return the flags of a server under `policy`, on two devices in all."""
        name, is_split = way_of(policy)
        counts = {"colocated": 0 if is_split else 2, "prefill": int(is_split)}
        counts["decode"] = counts["prefill"]
        flags = [f"--{role}-count={count}" for role, count in counts.items()]
        models = ",".join(f"{name}={self.reference}" for name in self.names)
        return [
            *flags,
            f"--policy={name}",
            f"--models={models}",
            f"--models-dir={self.models_dir}",
            "--device=staged",
            f"--device-memory-gb={self.memory_gb}",
            f"--link-gb-per-s={self.link_gb_per_s}",
            f"--slo-ttft-s={self.target.ttft_s}",
            f"--slo-tbt-s={self.target.tbt_s}",
            f"--costs-file={self.costs_file}",
            "--threads-per-instance=1",
            "--drain-s=2",
            "--no-prefix-cache",  # all prompts are alike, and each is to be run whole
        ]


def measure(setup: Setup, policy: str, load: Load) -> tuple[list[Served], Health]:
    """Serve `load` under `policy` by a server of its own. Raises ServerError."""
    with tempfile.TemporaryFile("w+", prefix="aegaeon-goodput-") as log:
        try:
            with running_server(setup.flags(policy), log) as url:
                return asyncio.run(replay(url, setup.names, load))
        except ServerError:
            log.seek(0)
            sys.stderr.writelines(log.readlines()[-20:])
            raise


def loads_of(setup: Setup, rates: Sequence[float], horizon_s: float, seed: int) -> list[Load]:
    """Return a load for each rate, in requests per second of all models; lengths are those of
    short questions and answers."""
    lengths = [(prompt, output) for prompt in (16, 32, 64, 96) for output in (16, 32, 48, 64)]
    return [
        poisson(setup.copies, rate / setup.copies, horizon_s, lengths, seed=seed) for rate in rates
    ]


def run(
    setup: Setup, policies: Sequence[str], rates: Sequence[float], horizon_s: float, rounds: int
) -> list[Point]:
    """Return what each policy reached at each rate, as medians over `rounds`."""
    measured: dict[tuple[str, float], list[tuple[list[Served], Health]]] = {}
    predicted: dict[tuple[str, str, float], list[float]] = {}
    for number in range(rounds):
        loads = loads_of(setup, rates, horizon_s, seed=number)
        for rate, load in zip(rates, loads, strict=True):
            order = policies if number % 2 == 0 else tuple(reversed(policies))
            for policy in order:
                progress(f"round {number + 1}: {policy}, {rate:g} requests/s, {len(load)} requests")
                key = (policy, rate)
                served, health = measure(setup, policy, load)
                measured.setdefault(key, []).append((served, health))
                for kind, slowness in ((ALONE, 1.0), (PACED, health.slowness)):
                    costs = slowed(setup.costs, slowness)
                    simulated = predict(load, costs, policy, setup.target)
                    predicted.setdefault((kind, *key), []).append(simulated.request)
    return [
        _point(
            (policy, rate),
            runs,
            statistics.median(predicted[PACED, policy, rate]),
            statistics.median(predicted[ALONE, policy, rate]),
            setup.target,
        )
        for (policy, rate), runs in measured.items()
    ]


def _point(
    key: tuple[str, float],
    runs: list[tuple[list[Served], Health]],
    predicted: float,
    predicted_alone: float,
    target: Target,
) -> Point:
    reached = [attainment(served, target) for served, _ in runs]
    return Point(
        policy=key[0],
        rate=key[1],
        reached=Attainment(
            *(
                statistics.median(getattr(one, kind) for one in reached)
                for kind in ("time", "token", "request")
            )
        ),
        predicted=predicted,
        predicted_alone=predicted_alone,
        served=tuple(one for served, _ in runs for one in served),
        switches=sum(health.switches for _, health in runs),
        switch_share=statistics.median(health.switch_share for _, health in runs),
        stall_share=statistics.median(health.stall_share for _, health in runs),
        slowness=statistics.median(health.slowness for _, health in runs),
    )


def goodputs(points: Sequence[Point]) -> dict[str, tuple[float | None, float | None]]:
    """Return each policy's goodput, as measured and as predicted, in requests per second."""
    policies = dict.fromkeys(point.policy for point in points)
    return {
        policy: (
            goodput((p.rate, p.reached.request) for p in points if p.policy == policy),
            goodput((p.rate, p.predicted) for p in points if p.policy == policy),
        )
        for policy in policies
    }


def weights_only(options: argparse.Namespace) -> Costs:
    """Return what was measured, for devices with the memory that the server gives to weights."""
    costs = decode_costs(options.costs.read_bytes(), str(options.costs))
    return msgspec.structs.replace(
        costs,
        device_memory_gb=WEIGHT_SHARE * options.memory_gb,
        link_gb_per_s=options.link_gb_per_s,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models-dir", type=Path, default=Path("models"), help="(default: %(default)s)")
    add("--model", default="SmolLM2-135M-Instruct", help="served as all copies")
    add("--copies", type=int, default=8, help="models (default: %(default)s)")
    add("--costs", type=Path, required=True, help="what calibrate.py wrote for this machine")
    add("--memory-gb", type=float, default=1.0, help="of a device (default: %(default)s)")
    add("--link-gb-per-s", type=float, default=1.0, help="to a device (default: %(default)s)")
    add("--rates", default="0.5,1,1.5,2", help="requests/s of all models (default: %(default)s)")
    add("--horizon-s", type=float, default=60.0, help="of a load (default: %(default)s)")
    add("--rounds", type=int, default=3, help="loads per rate (default: %(default)s)")
    add("--policies", default=",".join(POLICIES), help="(default: %(default)s)")
    add("--slo-ttft-s", type=float, default=5.0, help="target (default: %(default)s)")
    add("--slo-tbt-s", type=float, default=0.15, help="target (default: %(default)s)")
    add("--json", action="store_true", help="one JSON object on stdout instead of a table")
    options = parser.parse_args(arguments)
    try:
        setup = Setup(
            options.models_dir,
            options.model,
            options.copies,
            options.memory_gb,
            options.link_gb_per_s,
            Target(options.slo_ttft_s, options.slo_tbt_s),
            options.costs,
            weights_only(options),
        )
        rates = [float(rate) for rate in options.rates.split(",")]
        policies = tuple(options.policies.split(","))
        points = run(setup, policies, rates, options.horizon_s, options.rounds)
    except (AegaeonError, ServerError, OSError, ValueError) as error:
        print(f"goodput: error: {error}", file=sys.stderr)
        return 1
    publish("Goodput", rows_of(points, goodputs(points)), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
