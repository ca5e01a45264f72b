"""The flags that name a load, what its models cost and what is promised: of `simulate` and `plan`.

They become values here; what a load is stands in sim/workloads.py.
"""

import argparse
import math
from pathlib import Path

import msgspec

from aegaeon.errors import ConfigError
from aegaeon.metrics import Target
from aegaeon.scheduler.cost import Costs, ModelCost, decode_costs
from aegaeon.sim.workloads import Load, burst, lengths_of, poisson_of, prepare, read_load
from aegaeon.types import ModelId

SHIFT_S, HORIZON_S = 37.0, 120.0


class Case(msgspec.Struct, frozen=True):
    """A load ready to be simulated: its models' costs, the devices' and what is promised."""

    load: Load
    models: dict[ModelId, ModelCost]
    costs: Costs
    target: Target


def add_load_flags(parser: argparse.ArgumentParser) -> None:
    """Add them in groups."""
    files = parser.add_argument_group("the load, from files")
    files.add_argument(
        *("--workload", "-w"),
        metavar="FILE",
        nargs="+",
        help="CSV files in the form of the Aegaeon artifact or of Azure's traces of 2023; several "
        "are laid over each other, the models of each but the first renamed",
    )
    files.add_argument(
        *("--shift", "--shift-s"),
        metavar="S",
        type=float,
        default=SHIFT_S,
        help=f"each further file begins so much later (default: {SHIFT_S:g})",
    )
    files.add_argument(
        *("--horizon", "--horizon-s"),
        metavar="S",
        type=float,
        help="length of a load: what leaves it by the shift comes at its beginning, requests of a "
        f"file after it are left out (default: {HORIZON_S:g}; a single file: all of it)",
    )
    files.add_argument(
        "--tile", metavar="N", type=int, default=1, help="the whole so many times (default: 1)"
    )
    _add_generated(parser.add_argument_group("the load, generated"))
    _add_fleet(parser.add_argument_group("devices and promises"))


def _add_generated(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--generate",
        choices=("poisson", "bursty"),
        help="requests independent of each other; bursty: with a burst in the middle",
    )
    group.add_argument(
        "--models",
        metavar="N|A,B,C",
        help="how many models, or their names; those named like a kind of --costs are of it",
    )
    group.add_argument(
        *("--rates", "--rate"),
        metavar="R,R,...",
        help="requests per second of each model: one for all, one for each, or NxR for N of them",
    )
    group.add_argument(
        "--zipf",
        metavar="A",
        type=float,
        default=0.0,
        help="popularity: model k gets a share like 1/k^A of all requests (default: 0, all alike)",
    )
    group.add_argument(
        "--lengths",
        metavar="FILE",
        help="a CSV file as for --workload, from which prompt and output lengths are drawn "
        "(default: those of --workload, which then is no load itself)",
    )
    group.add_argument("--seed", metavar="N", type=int, default=0, help="of all that is drawn")
    group.add_argument(
        "--burst-s", metavar="S", type=float, default=5.0, help="bursty: for so long (default: 5)"
    )
    group.add_argument(
        "--burst-factor",
        metavar="N",
        type=int,
        default=10,
        help="bursty: so many times the requests (default: 10)",
    )


def _add_fleet(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--costs",
        metavar="FILE",
        required=True,
        help="JSON with what models cost on a device, and its link and memory",
    )
    group.add_argument(
        "--link-gb-per-s", metavar="X", type=float, help="another link than the costs say"
    )
    group.add_argument(
        "--slo-ttft",
        metavar="S",
        type=float,
        default=10.0,
        help="promised time to the first token (default: 10)",
    )
    group.add_argument(
        "--slo-tbt",
        metavar="S",
        type=float,
        default=0.1,
        help="promised time between tokens (default: 0.1)",
    )


def case_of(options: argparse.Namespace) -> Case:
    """Return what the flags name. Raises ConfigError."""
    if not (0 < options.slo_ttft < math.inf and 0 < options.slo_tbt < math.inf):
        raise ConfigError("--slo-ttft and --slo-tbt are seconds above 0")
    costs = read_costs(Path(options.costs), options.link_gb_per_s)
    is_generated = bool(options.generate or options.models or options.rates)
    if not is_generated and not options.workload:
        raise ConfigError("name the load: --workload FILE, or --models N --rates R --lengths FILE")
    horizon_s = HORIZON_S if options.horizon is None else options.horizon
    if is_generated:
        loads = [_generate(options, horizon_s)]
    else:
        is_whole = options.horizon is None and len(options.workload) == options.tile == 1
        until_s = math.inf if is_whole else horizon_s
        loads = [read_load(Path(name).expanduser(), until_s) for name in options.workload]
    load, models = prepare(loads, costs, options.shift, horizon_s, options.tile)
    if not load:
        raise ConfigError("the load has no requests; give other files, or a longer --horizon")
    return Case(load, models, costs, Target(options.slo_ttft, options.slo_tbt))


def read_costs(path: Path, link_gb_per_s: float | None = None) -> Costs:
    """Return the costs in the file at `path`, with another link if one is given. Raises
    ConfigError."""
    try:
        data = path.expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read --costs {path}: {error.strerror}") from None
    costs = decode_costs(data, str(path))
    if link_gb_per_s is None:
        return costs
    if not 0 < link_gb_per_s < math.inf:
        raise ConfigError("--link-gb-per-s is above 0")
    return msgspec.structs.replace(costs, link_gb_per_s=link_gb_per_s)


def _generate(options: argparse.Namespace, horizon_s: float) -> Load:
    if not options.rates:
        raise ConfigError("a generated load needs --rates, in requests per second of a model")
    files = [options.lengths] if options.lengths else options.workload
    if not files:
        raise ConfigError("a generated load needs --lengths FILE to draw prompts and outputs from")
    if not 0 < horizon_s < math.inf:
        raise ConfigError("--horizon is seconds above 0")
    rates = with_popularity(rates_of(options.models, options.rates), options.zipf)
    lengths = [pair for name in files for pair in lengths_of(read_load(Path(name).expanduser()))]
    load = poisson_of(rates, horizon_s, lengths, options.seed)
    if options.generate == "bursty":
        if not options.burst_s > 0 or options.burst_factor < 1:
            raise ConfigError("--burst-s is above 0, --burst-factor at least 1")
        load = burst(load, horizon_s / 2, options.burst_s, options.burst_factor)
    return load


def rates_of(models: str | None, rates: str) -> dict[ModelId, float]:
    """Return the rate of each model: `models` is their count or names, `rates` one for all, one
    for each, or NxR for N of them. Raises ConfigError."""
    each: list[float] = []
    try:
        for part in rates.split(","):
            count, times, rate = part.strip().rpartition("x")
            each += [float(rate)] * (int(count) if times else 1)
        names = [] if models is None else [name.strip() for name in models.split(",")]
        if len(names) == 1 and names[0].isdecimal():
            names = [f"model-{number:04d}" for number in range(int(names[0]))]
    except ValueError:
        raise ConfigError(f"--rates {rates} is not R, R,R,... or NxR,...") from None
    names = names or [f"model-{number:04d}" for number in range(len(each))]
    if len(each) == 1:
        each *= len(names)
    if len(each) != len(names) or len(set(names)) != len(names) or not all(names):
        raise ConfigError(f"{len(names)} --models and {len(each)} --rates: one for each, please")
    if not all(0 <= rate < math.inf for rate in each):
        raise ConfigError(f"--rates {rates}: a rate is 0 or more requests per second")
    return dict(zip(names, each, strict=True))


def with_popularity(rates: dict[ModelId, float], zipf: float) -> dict[ModelId, float]:
    """Return `rates` weighed by popularity, the first model being the most popular; their sum
    stays."""
    weighed = [rate / rank**zipf for rank, rate in enumerate(rates.values(), 1)]
    total = math.fsum(weighed)
    scale = math.fsum(rates.values()) / total if total else 1.0
    return {model: scale * rate for model, rate in zip(rates, weighed, strict=True)}
