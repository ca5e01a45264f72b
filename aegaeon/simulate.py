"""The command `aegaeon simulate`: flags become a load and a fleet, a run becomes a report."""

import argparse
import time
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

import msgspec
from rich.table import Table
from tqdm import tqdm

from aegaeon.errors import ConfigError
from aegaeon.flags import Parser
from aegaeon.load_flags import Case, add_load_flags, case_of
from aegaeon.scheduler.policies import POLICIES, Fleet, Policy
from aegaeon.sim.cluster import Extras, Failure, Simulated, simulate
from aegaeon.sim.fleets import make_fleet, policy_of
from aegaeon.sim.report import Report, make_report, render

EXAMPLES = """\
examples:
  aegaeon simulate -w load.csv --costs h100.json --devices 16
  aegaeon simulate -w a.csv b.csv --horizon 60 --tile 2 --costs h100.json --devices 16 --json
  aegaeon simulate -w load.csv --costs h100.json --devices 16 --policy paper --prefill-count 6
  aegaeon simulate --models 80 --rates 0.1 --zipf 1 --lengths azure.csv --costs h100.json \\
    --devices 16 --slo-ttft 5 --timeline who-ran.html
  aegaeon simulate --generate bursty --rates 60x0.1,4x2 --lengths load.csv --costs h100.json \\
    --devices 16 --fail 40:3,80:12

Nothing is served or loaded: the schedulers decide under a virtual clock, and actions take what the
costs say. The same command gives the same figures, but for wall_s.

figures: attainment_request counts requests with TTFT and mean TBT within the promise,
attainment_token the tokens made by their due time, attainment_time is that of the Aegaeon artifact.
exit codes: 0 simulated, 2 wrong usage or files"""
STEP = 64  # requests between two looks at the bar


def make_parser() -> Parser:
    """Return the parser of the command's flags."""
    parser = Parser(
        prog="aegaeon simulate",
        description="Serve a load on devices that are not there, and say who kept what promise.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--policy",
        metavar="P",
        default="slack",
        help=f"who runs when: {', '.join(POLICIES)} (default: slack)",
    )
    parser.add_argument("--devices", metavar="N", type=int, required=True, help="how many")
    parser.add_argument(
        "--prefill-count",
        metavar="P",
        type=int,
        help="of them only prefill, the others only decode (default: 0, all do both; with the "
        "policy paper 3 of 8)",
    )
    parser.add_argument(
        "--fail",
        metavar="S:DEVICE,...",
        default="",
        help="devices that fail for good, numbered from 0, and after how many seconds",
    )
    parser.add_argument("--json", action="store_true", help="the report as JSON, for programs")
    parser.add_argument(
        "--timeline", metavar="FILE.html", help="write a picture of who ran where and when"
    )
    add_load_flags(parser)
    return parser


def simulate_command(given: Sequence[str]) -> Iterable[Table | str]:
    """Run the command and return what it prints. Raises ConfigError."""
    options = make_parser().parse_args(given)
    policy = policy_of(options.policy)
    failures = failures_of(options.fail)
    painter = None if options.timeline is None else _import_picture()
    case = case_of(options)
    fleet = make_fleet(options.policy, options.devices, case.target, options.prefill_count)
    with tqdm(total=len(case.load), unit="request", desc=options.policy, disable=None) as bar:

        def show(done: int) -> None:
            if done % STEP == 0 or done == len(case.load):
                bar.update(done - bar.n)

        extras = Extras(painter is not None, show, failures)
        report, run = run_case(case, policy, fleet, extras)
    if painter is not None:
        title = f"{report.policy}, {report.models} models on {report.devices} devices"
        painter.write_picture(Path(options.timeline).expanduser(), run.spans, title)
    if options.json:
        return (msgspec.json.encode(report).decode(),)
    return render(report)


def run_case(
    case: Case,
    policy: Policy,
    fleet: Fleet,
    extras: Extras = Extras(),  # noqa: B008  frozen
) -> tuple[Report, Simulated]:
    """Simulate `case` and time it, metrics included."""
    began_s = time.perf_counter()
    run = simulate(case.load, case.models, case.costs, policy, fleet, extras)
    report = make_report(run, policy.name, case.target)
    wall_s = time.perf_counter() - began_s
    return msgspec.structs.replace(report, wall_s=wall_s), run


def failures_of(text: str) -> tuple[Failure, ...]:
    """Return the failures that "S:DEVICE,S:DEVICE" names. Raises ConfigError."""
    failures = []
    for part in filter(None, text.split(",")):
        at_s, _, device = part.partition(":")
        try:
            failures.append(Failure(float(at_s), int(device)))
        except ValueError:
            raise ConfigError(f"--fail {text} is not S:DEVICE,S:DEVICE,...") from None
    return tuple(failures)


def _import_picture() -> ModuleType:
    # Imported where it is wanted: Bokeh is an extra, and takes a second to import.
    try:
        return import_module("aegaeon.sim.picture")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--timeline needs {error.name}; run: pip install 'aegaeon[sim]'"
        ) from None
