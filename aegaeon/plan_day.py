"""`aegaeon plan --trace`: a day of many models on many nodes, or how many devices it needs."""

import argparse
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
from rich.table import Table

from aegaeon.day_report import render_curve, render_day
from aegaeon.day_runs import Asked, Pool, find_curve, simulate_day
from aegaeon.errors import ConfigError
from aegaeon.flags import Parser
from aegaeon.load_flags import read_costs
from aegaeon.metrics import Target
from aegaeon.scheduler.policies import POLICIES
from aegaeon.sim.curves import check_picture, write_curves
from aegaeon.sim.fleets import policy_of
from aegaeon.sim.traces import laid_over, popularity, read_profile

EXAMPLES = """\
examples:
  aegaeon plan --trace azure-week.csv --costs h100.json --models 5000 --rate 500 --devices 10000
  aegaeon plan --trace conv.csv code.csv --costs h100.json --models 5000 --rate 500 \\
    --loads 0.25,0.5,1,2 --policies slack,paper,request --picture needed.svg
  aegaeon plan --trace conv.csv --costs h100.json --models 300 --rate 40 --devices 64 \\
    --mtbf-hours 100 --json

With --devices: models are placed on nodes hour by hour, nodes are lost and come back, and nodes
drawn in proportion to their requests are simulated token by token, a minute each; the share of
requests that keep the promise comes with its standard error. Without: how few devices keep
--least of the requests, for each of --loads.

The trace says when requests come and how long they are; a trace that is shorter than the day begins
again. --models share the requests by --zipf.
exit codes: 0 done, 2 wrong usage or files"""


def make_parser() -> Parser:
    """Return the parser of the command's flags."""
    parser = Parser(
        prog="aegaeon plan",
        description="Plan a day of many models on many nodes, from a published trace.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--policies",
        metavar="P,...",
        default="slack",
        help=f"by which policies, of {', '.join(POLICIES)} (default: slack)",
    )
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    _add_load(parser.add_argument_group("the load"))
    _add_nodes(parser.add_argument_group("nodes"))
    _add_search(parser.add_argument_group("how many devices are needed (without --devices)"))
    _add_effort(parser.add_argument_group("effort"))
    return parser


def _add_load(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--trace",
        metavar="FILE",
        nargs="+",
        required=True,
        help="CSV files in the form of Azure's LLM traces of 2023 and 2024, of BurstGPT, or of the "
        "Aegaeon artifact; several are laid over each other",
    )
    group.add_argument("--hours", metavar="H", type=float, default=24.0, help="default: 24")
    group.add_argument(
        "--shape",
        metavar="X,X,...",
        default="1",
        help="weights of equal parts of the day, such as 24 for its hours (default: all alike)",
    )
    group.add_argument(
        "--rate",
        metavar="R",
        type=float,
        help="requests a second, of all models, in the mean of the day (default: the trace's own)",
    )
    group.add_argument("--models", metavar="N", type=int, default=100, help="default: 100")
    group.add_argument(
        "--zipf",
        metavar="A",
        type=float,
        default=1.0,
        help="popularity: model k gets a share like 1/k^A of all requests (default: 1)",
    )
    group.add_argument("--slo-ttft", metavar="S", type=float, default=10.0, help="default: 10")
    group.add_argument("--slo-tbt", metavar="S", type=float, default=0.1, help="default: 0.1")


def _add_nodes(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--costs", metavar="FILE", required=True, help="JSON with what models cost on a device"
    )
    group.add_argument("--devices", metavar="N", type=int, help="how many, of all nodes")
    group.add_argument("--devices-per-node", metavar="N", type=int, default=8, help="default: 8")
    group.add_argument(
        "--cache-gb",
        metavar="X",
        type=float,
        default=1000.0,
        help="of a node's host memory, for the weights of the models that live there "
        "(default: 1000)",
    )
    group.add_argument(
        "--wire-gb-per-s",
        metavar="X",
        type=float,
        default=12.5,
        help="at which weights come to a node (default: 12.5)",
    )
    group.add_argument(
        "--mtbf-hours", metavar="H", type=float, help="a node is lost so often (default: never)"
    )
    group.add_argument(
        "--repair-hours", metavar="H", type=float, default=1.0, help="and back then (default: 1)"
    )
    group.add_argument(
        "--notice-s",
        metavar="S",
        type=float,
        default=5.0,
        help="until a lost node is missed: its lease (default: 5)",
    )


def _add_search(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--loads",
        metavar="X,X,...",
        default="1",
        help="multiples of --rate to find devices for (default: 1)",
    )
    group.add_argument(
        "--least",
        metavar="SHARE",
        type=float,
        default=0.9,
        help="of the requests that must have TTFT and mean TBT as promised (default: 0.9)",
    )
    group.add_argument(
        "--max-devices", metavar="N", type=int, default=20_000, help="never more (default: 20000)"
    )
    group.add_argument(
        "--picture", metavar="FILE.svg", help="draw devices needed against load: .svg or .png"
    )


def _add_effort(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--samples",
        metavar="N",
        type=int,
        help="minutes of nodes to simulate, at most (default: 200 with --devices, else 24 for each "
        "number of devices that is tried)",
    )
    group.add_argument(
        "--jobs", metavar="N", type=int, help="processes (default: one for each processor)"
    )
    group.add_argument("--seed", metavar="N", type=int, default=0, help="of all that is drawn")


def plan_day_command(given: Sequence[str]) -> Iterable[Table | str]:
    """Run the command and return what it prints. Raises ConfigError."""
    began_s = time.perf_counter()
    options = make_parser().parse_args(given)
    names = [policy_of(name.strip()).name for name in options.policies.split(",")]
    if options.devices is not None and len(names) > 1:
        raise ConfigError("--devices simulates one of --policies; leave it out to compare several")
    picture = None if options.picture is None else Path(options.picture).expanduser()
    if picture is not None:
        check_picture(picture)
    asked = _asked(options)
    with Pool(options.jobs) as pool:
        if options.devices is not None:
            report = simulate_day(asked, names[0], options.devices, pool)
            report = msgspec.structs.replace(report, wall_s=time.perf_counter() - began_s)
            return (msgspec.json.encode(report).decode(),) if options.json else render_day(report)
        loads = numbers_of("--loads", options.loads)
        curve = find_curve(asked, names, loads, pool)
    curve = msgspec.structs.replace(curve, wall_s=time.perf_counter() - began_s)
    if picture is not None:
        title = f"{curve.models:,} models, {100 * curve.least_attainment:g} % of the requests kept"
        write_curves(picture, curve.lines(), title)
    return (msgspec.json.encode(curve).decode(),) if options.json else render_curve(curve)


def _asked(options: argparse.Namespace) -> Asked:
    for name in ("hours", "slo_ttft", "slo_tbt", "cache_gb", "wire_gb_per_s", "repair_hours"):
        if not 0 < getattr(options, name) < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} is above 0")
    if options.rate is not None and not 0 < options.rate < float("inf"):
        raise ConfigError("--rate is requests a second, above 0")
    if options.mtbf_hours is not None and not options.mtbf_hours > 0:
        raise ConfigError("--mtbf-hours is above 0")
    if not 0 < options.least <= 1 or options.devices_per_node < 2 or options.notice_s < 0:
        raise ConfigError(
            "--least is above 0 and at most 1, --devices-per-node at least 2, --notice-s 0 or more"
        )
    samples = options.samples or (200 if options.devices is not None else 24)
    if samples < 8:
        raise ConfigError("--samples is at least 8; fewer say nothing")
    seconds, shape = options.hours * 3600, numbers_of("--shape", options.shape)
    traces = [read_profile(Path(name).expanduser()) for name in options.trace]
    profile = laid_over(traces).lasting(seconds, shape)
    if options.rate is not None:
        profile = profile.scaled(options.rate / profile.mean)
    return Asked(
        profile=profile,
        shares=popularity(options.models, options.zipf),
        costs=read_costs(Path(options.costs)),
        target=Target(options.slo_ttft, options.slo_tbt),
        devices_per_node=options.devices_per_node,
        cache_gb=options.cache_gb,
        wire_gb_per_s=options.wire_gb_per_s,
        mtbf_s=None if options.mtbf_hours is None else options.mtbf_hours * 3600,
        repair_s=options.repair_hours * 3600,
        notice_s=options.notice_s,
        least=options.least,
        max_devices=options.max_devices,
        samples=samples,
        seed=options.seed,
    )


def numbers_of(flag: str, text: str) -> tuple[float, ...]:
    """Return what "X,X,..." lists, numbers of 0 or more. Raises ConfigError."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 <= number < float("inf") for number in found) or not any(found):
        raise ConfigError(f"{flag} {text} is not X,X,... with numbers of 0 or more")
    return found
