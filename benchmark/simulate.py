#!/usr/bin/env python3
"""Simulated devices: our policies against the paper's figures and each other, and curves of
attainment over models, rates and targets.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# Started by its path, Python looks beside this file and not in the root of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aegaeon.errors import AegaeonError
from aegaeon.flags import Parser
from aegaeon.scheduler.policies import POLICIES
from aegaeon.sim.fleets import policy_of
from benchmark.report_rows import Row, progress, publish
from benchmark.simulate_cases import Bench
from benchmark.simulate_curves import Sweep, draw, rows, sweep
from benchmark.simulate_speed import large, speed
from benchmark.simulate_suite import suite

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = """\
examples:
  python benchmark/simulate.py --suite paper --json > results/simulate.json
  python benchmark/simulate.py --curves results --models 32,64,96,128 --rates 0.1,0.5
  python benchmark/simulate.py --suite speed --large"""


def numbers(text: str) -> tuple[float, ...]:
    """Return what "A,B,C" lists."""
    return tuple(float(part) for part in text.split(","))


def make_parser() -> Parser:
    """Return the parser of the flags."""
    parser = Parser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--suite", choices=("paper", "speed"), help="the project's questions, or only the speed"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument(
        "--data",
        metavar="DIR",
        type=Path,
        default=ROOT.parent / "shared" / "data",
        help="where paper/ and traces/ are (default: ../shared/data beside the repository)",
    )
    parser.add_argument("--devices", metavar="N", type=int, default=16, help="default: 16")
    parser.add_argument(
        "--large", action="store_true", help="1,000 models on 256 devices for an hour, too"
    )
    parser.add_argument("--curves", metavar="DIR", type=Path, help="draw attainment.png and .svg")
    curves = parser.add_argument_group("curves")
    curves.add_argument("--policies", default=",".join(POLICIES), help="default: all")
    curves.add_argument("--models", type=numbers, default=(16, 32, 48, 64, 80, 96, 128, 160))
    curves.add_argument("--rates", type=numbers, default=(0.1, 0.5), help="default: 0.1,0.5")
    curves.add_argument("--scales", type=numbers, default=(1.0,), help="of the targets; default: 1")
    return parser


def measure(options: argparse.Namespace) -> list[Row]:
    """Return the rows that `options` ask for; curves are drawn on the way."""
    bench = Bench(options.data, options.devices)
    found: list[Row] = []
    if options.suite == "paper":
        found += suite(bench)
    if options.suite is not None:
        found += speed(bench)
    if options.large:
        found += large(options.data)
    if options.curves is not None:
        names = tuple(policy_of(name.strip()).name for name in options.policies.split(","))
        models = tuple(int(number) for number in options.models)
        asked = Sweep(policies=names, models=models, rates=options.rates, scales=options.scales)
        points = sweep(bench, asked)
        found += rows(points)
        for file in draw(points, options.curves):
            progress(f"wrote {file}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and publish; return the exit code."""
    parser = make_parser()
    try:
        options = parser.parse_args(arguments)
        if options.suite is None and options.curves is None and not options.large:
            parser.error("nothing to do: give --suite paper, --curves DIR or --large")
        publish("simulated devices", measure(options), options.json)
    except AegaeonError as error:
        print(f"simulate.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
