"""The rows of `benchmark/simulate.py --suite paper`: reproduction, comparison, strict promises,
capacity and robustness. Speed is measured in simulate_speed.py.
"""

from collections.abc import Iterator, Sequence

import msgspec

from aegaeon.load_flags import Case
from aegaeon.metrics import goodput
from aegaeon.scheduler.policies import POLICIES
from aegaeon.sim.cluster import Failure
from aegaeon.sim.report import Report
from aegaeon.sim.workloads import burst
from benchmark.report_rows import Aim, Row, measured
from benchmark.simulate_bounds import device_share, link_share
from benchmark.simulate_cases import Bench, Workload
from benchmark.simulate_reproduction import REFERENCE, THEIRS, WITHIN, reproduction

METRICS = ("attainment_request", "attainment_token", "attainment_time")

REFERENCE_MODELS = {"0.1": 62, "0.5": 38}  # theirs at 0.90, attainment_request

STRICT = {
    Workload((80, 48)): 0.99,
    Workload((80, 80)): 0.90,
    Workload((54, 24), "0.5", tile=2): 0.99,
    Workload((54, 40), "0.5", tile=2): 0.90,
}
LADDERS = {
    "0.1": (
        *((48,), (64,), (80,), (80, 16), (80, 32), (80, 48), (80, 64), (80, 80)),
        *((80, 80, 16), (80, 80, 32), (80, 80, 48), (80, 80, 64), (80, 80, 80)),
    ),
    "0.5": (
        *((24,), (40,), (54,), (40, 24), (54, 24), (54, 40), (54, 54)),
        *((54, 40, 24), (54, 54, 24), (54, 54, 40)),
    ),
}
SCALES = (1.0, 0.5, 0.3)
SLIGHTLY = 0.01  # by which slack may be worse than paper where the load is not the usual one


def suite(bench: Bench) -> Iterator[Row]:
    """Yield the rows in order, those of policies that exist."""
    for policy in WITHIN:
        if policy in POLICIES:
            yield from reproduction(bench, policy)
    if "paper" in POLICIES:
        yield from comparison(bench)
    yield from strict(bench)
    for rate in LADDERS:
        yield from capacity(bench, rate)
    yield from robustness(bench)


def comparison(bench: Bench) -> Iterator[Row]:
    """Ours beside the paper's policy, with the usual targets and with strict ones."""
    for scale in SCALES:
        for workload in REFERENCE:
            ours, theirs = (bench.run(workload, policy, scale) for policy in ("slack", "paper"))
            yield from _beside(f"slack, {workload.name}, targets x{scale:g}", ours, theirs, 0.0)


def _beside(case: str, ours: Report, theirs: Report | None, allowed: float) -> Iterator[Row]:
    """Rows of all metrics; `allowed` is by how much ours may be worse."""
    for metric in METRICS:
        value: float = getattr(ours, metric)
        row = Row(case=f"{case}: {metric}", unit="share", ours=value)
        if theirs is None:
            yield row
            continue
        other: float = getattr(theirs, metric)
        row = msgspec.structs.replace(row, peer="paper", peer_value=other)
        aim = f">= paper - {allowed:g}" if allowed else ">= paper"
        is_met = value >= other - allowed - 1e-12
        yield msgspec.structs.replace(measured(row), aim=aim, met=is_met)


def strict(bench: Bench) -> Iterator[Row]:
    """Requests kept where models are many, and what such a load needs of the devices."""
    for workload, bound in STRICT.items():
        report = bench.run(workload, "slack")
        row = Row(
            case=f"slack, {workload.name}: attainment_request",
            unit="share",
            ours=report.attainment_request,
        )
        yield measured(row, Aim("ours", bound, f">= {bound:.2f}"))
        case = bench.case(workload)
        for name, value in (
            ("device time needed", device_share(case, bench.devices)),
            ("device time needed for 90 % of it", device_share(case, bench.devices, 0.9)),
            ("link time needed", link_share(case, bench.devices)),
        ):
            yield Row(case=f"anybody, {workload.name}: {name}", unit="share", ours=value)


def capacity(bench: Bench, rate: str) -> Iterator[Row]:
    """The most models of which 90 % of the requests are kept, linear between loads.

    The limit is where device time, or link time, ends for 90 % of the requests, in proportion from
    the largest load.
    """
    tile = 2 if rate == "0.5" else 1
    ladder = [Workload(sizes, rate, tile=tile) for sizes in LADDERS[rate]]
    largest = bench.case(ladder[-1])
    needed = max(device_share(largest, bench.devices, 0.9), link_share(largest, bench.devices))
    limit = ladder[-1].models / needed
    policies = [name for name in ("slack", "paper") if name in POLICIES]
    found = {name: _most(bench, ladder, name) for name in policies}
    theirs = (THEIRS, REFERENCE_MODELS[rate])
    for name, models in found.items():
        peers = (
            [theirs, ("paper", found["paper"])]
            if name == "slack" and "paper" in found
            else [theirs]
        )
        for peer, value in peers:
            row = Row(
                case=f"{name}, models at {rate}/s with attainment_request >= 0.90",
                unit="models",
                ours=models,
                peer=peer,
                peer_value=value,
                limit=limit,
            )
            aim = Aim("ratio_to_peer", 2.5, ">= 2.5x") if name == "slack" else None
            yield measured(row, aim)


def _most(bench: Bench, ladder: Sequence[Workload], policy: str) -> float:
    points: list[tuple[float, float]] = []
    for workload in ladder:
        share = bench.run(workload, policy).attainment_request
        points.append((workload.models, share))
        if share < 0.9:
            break
    return goodput(points) or 0.0


def robustness(bench: Bench) -> Iterator[Row]:
    """Loads and devices that are not the usual ones."""
    for name, case, failures in _unusual(bench):
        ours = bench.run_case(case, "slack", name, failures)
        theirs = None
        if "paper" in POLICIES:
            theirs = bench.run_case(case, "paper", name, failures)
        yield from _beside(f"slack, {name}", ours, theirs, SLIGHTLY)


def _unusual(bench: Bench) -> Iterator[tuple[str, Case, Sequence[Failure]]]:
    large, middle = Workload((80,)), Workload((64,))
    lengths = bench.data / "paper" / "synth-80-0.1-1.0-1.0.csv"
    for zipf in (0.8, 1.2):
        load = bench.generated(80, 0.1, lengths, zipf)
        yield f"80 models at 0.1/s in the mean, Zipf {zipf:g}", bench.case_of([load]), ()
    for workload in (middle, large):
        load = burst(bench.load(workload)[0], 60.0, 5.0, 10)
        yield f"{workload.name}, 10 times as many for 5 s", bench.case_of([load]), ()
    for kind, name in (("conv", "conversation"), ("code", "code")):
        trace = bench.data / "traces" / f"AzureLLMInferenceTrace_{kind}.csv"
        if trace.exists():
            load = bench.generated(64, 0.1, trace)
            yield f"64 models at 0.1/s, lengths of Azure's {name}", bench.case_of([load]), ()
    for link in (8.0, 32.0, 64.0):
        costs = msgspec.structs.replace(bench.costs, link_gb_per_s=link)
        case = bench.case_of(bench.load(large), costs=costs)
        yield f"{large.name}, link of {link:g} GB/s", case, ()
    for workload in (middle, large):
        gone = (Failure(40.0, bench.devices // 5), Failure(80.0, 3 * bench.devices // 4))
        yield f"{workload.name}, 2 devices fail", bench.case(workload), gone
