"""`aegaeon plan --costs`: how many devices a load needs, found by simulating it."""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
from rich.table import Table
from tqdm import tqdm

from aegaeon.errors import ConfigError
from aegaeon.flags import Parser
from aegaeon.load_flags import Case, add_load_flags, case_of
from aegaeon.metrics import Target
from aegaeon.scheduler.policies import POLICIES
from aegaeon.sim.fleets import SPLIT, make_fleet, policy_of
from aegaeon.sim.sizing import Sizing, find_least
from aegaeon.simulate import run_case

EXAMPLES = """\
examples:
  aegaeon plan --costs h100.json --rates 80x0.1 --lengths load.csv
  aegaeon plan --costs h100.json --models chat,code,rare --rates 2,0.5,0.01 --lengths azure.csv
  aegaeon plan --costs h100.json --rates 120x0.1 --workload day.csv   # more of the same
  aegaeon plan --costs h100.json --workload day.csv --slo-ttft 5 --slo-tbt 0.05 --json

Simulates the load on more and on fewer devices. Without --costs the command shows what fits where
on this node: `aegaeon plan --help`.
exit codes: 0 done, 2 wrong usage or files"""


class DevicesPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a load needs: `devices` by the first policy asked for, and by each in `policies`."""

    models: int
    requests: int
    target: Target
    least_attainment: float
    devices: int | None
    policies: tuple[Sizing, ...]


def make_parser() -> Parser:
    """Return the parser of the command's flags."""
    parser = Parser(
        prog="aegaeon plan",
        description="Find the smallest number of devices that keeps what is promised to clients.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    known = [name for name in ("slack", "paper") if name in POLICIES]
    parser.add_argument(
        "--policies",
        metavar="P,...",
        default=",".join(known),
        help=f"by which policies, of {', '.join(POLICIES)} (default: {','.join(known)})",
    )
    parser.add_argument(
        "--least",
        metavar="SHARE",
        type=float,
        default=0.9,
        help="of the requests that must have TTFT and mean TBT as promised (default: 0.9)",
    )
    parser.add_argument(
        "--max-devices", metavar="N", type=int, default=256, help="never more (default: 256)"
    )
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    add_load_flags(parser)
    return parser


def plan_devices_command(given: Sequence[str]) -> Iterable[Table | str]:
    """Run the command and return what it prints. Raises ConfigError."""
    options = make_parser().parse_args(given)
    if not 0 < options.least <= 1 or options.max_devices < 2:
        raise ConfigError("--least is above 0 and at most 1, --max-devices at least 2")
    names = [name.strip() for name in options.policies.split(",")]
    for name in names:
        policy_of(name)
    case = case_of(options)
    with tqdm(desc="simulating", unit="run", disable=None) as bar:

        def show(policy: str, devices: int) -> None:
            bar.set_description(f"{policy} on {devices}")
            bar.update()

        search = Search(case, options.max_devices, options.least, show)
        found = tuple(search.least_devices(name) for name in names)
    plan = DevicesPlan(
        models=len(case.models),
        requests=len(case.load),
        target=case.target,
        least_attainment=options.least,
        devices=found[0].devices,
        policies=found,
    )
    return (msgspec.json.encode(plan).decode(),) if options.json else render(plan)


@dataclass(frozen=True, slots=True)
class Search:
    """Looks for the least number of devices, up to `most`; `show` hears what is simulated."""

    case: Case
    most: int
    share: float
    show: Callable[[str, int], None]

    def least_devices(self, policy: str) -> Sizing:
        """Return what the case needs under `policy`."""

        def kept(devices: int) -> float:
            self.show(policy, devices)
            fleet = make_fleet(policy, devices, self.case.target)
            return run_case(self.case, policy_of(policy), fleet)[0].attainment_request

        first = 2 if policy in SPLIT else 1
        return find_least(policy, kept, first=first, most=self.most, share=self.share)


def render(plan: DevicesPlan) -> Iterator[Table | str]:
    """Yield what a person reads of `plan`, in order."""
    target = plan.target
    yield (
        f"{plan.requests} requests for {plan.models} models; {100 * plan.least_attainment:g} % of "
        f"them within {target.ttft_s:g} s to the first token and {target.tbt_s:g} s between tokens"
    )
    table = Table("policy", "devices", "kept", "tried", box=None, pad_edge=False)
    for one in plan.policies:
        most = max(devices for devices, _ in one.tried)
        tried = ", ".join(f"{devices}: {100 * share:.1f} %" for devices, share in one.tried)
        table.add_row(
            one.policy,
            f"more than {most}" if one.devices is None else str(one.devices),
            f"{100 * one.attainment_request:.1f} %",
            tried,
        )
    yield table
