#!/usr/bin/env python3
"""Two nodes beside one: the goodput of a server on a Ray cluster over Redis, and what the simulator
says of the same loads.

All of it is real but the devices: engines without a model, which take as long as costs say.
"""

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

# Started by its path, Python looks beside this file and not in the root of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import msgspec
import uvloop

from aegaeon.config import Settings
from aegaeon.errors import AegaeonError
from aegaeon.metrics import (
    Served,
    Target,
    attainment,
    goodput,
    summarize,
    time_to_first_token_s,
    times_between_tokens_s,
)
from aegaeon.models.references import served_models
from aegaeon.proxy.worker import allow_connections
from aegaeon.scheduler.cost import Costs, ModelCost
from aegaeon.scheduler.demand import Flow
from aegaeon.scheduler.policies import POLICIES
from aegaeon.sim.nodes import Setup, node_of, simulate_nodes
from aegaeon.sim.workloads import Load, poisson_of
from benchmark.redis_peer import own_redis
from benchmark.report_rows import Aim, Row, measured, progress, publish
from benchmark.serve import Server, measure
from benchmark.serve_load import Ask
from benchmark.serve_rows import LATE_MS, Run
from benchmark.serving import ServerError, running_server
from benchmark.stream_client import StreamError

EPILOG = """\
examples:
  cluster_nodes.py --models-dir models --json
  cluster_nodes.py --models-dir models --simulated     # without Ray and Redis: the prediction alone

Goodput is the highest rate at which 90 % of the requests have their first token within --slo-ttft-s
and the mean time between tokens within --slo-tbt-s. Rates rise by --step from below what is
predicted until one is kept no more; each is served for --horizon-s by a server of one node, then of
two, and the simulator gets the same requests. Steps take --step-ms, so that processors have little
to do: how much they did stands in the rows. Where the generator was late something else kept them
busy: the figures are too low then. Needs redis-server and Ray (make test-cluster)."""

NODES = (1, 2)
AIM = 1.8
LEAST = 0.9
LENGTHS = tuple((prompt, output) for prompt in (16, 32, 64) for output in (8, 16, 24, 32))
PATIENCE_S = 60.0  # after the last request is due
MOST_RATES = 12  # of a search
OBJECT_BYTES = 100 << 20  # for Ray, which is given no objects


@dataclass(frozen=True)
class Plan:
    """What is served, at what pace, and with what promise."""

    names: tuple[str, ...]
    reference: str
    models_dir: Path
    costs: Costs
    target: Target
    horizon_s: float
    seed: int

    def load(self, rate: float) -> Load:
        """Return requests of all models alike, `rate` a second in all."""
        each = dict.fromkeys(self.names, rate / len(self.names))
        return poisson_of(each, self.horizon_s, LENGTHS, self.seed)

    def flags(self, address: str, redis_url: str, costs_file: Path) -> list[str]:
        """Return the flags of the server on the Ray cluster at `address`."""
        return [
            f"--cluster={address}",
            "--metadata-backend=redis",
            f"--redis-url={redis_url}",
            f"--models={','.join(f'{name}={self.reference}' for name in self.names)}",
            f"--models-dir={self.models_dir}",
            "--device=null",
            "--colocated-count=1",
            f"--costs-file={costs_file}",
            f"--slo-ttft-s={self.target.ttft_s}",
            f"--slo-tbt-s={self.target.tbt_s}",
            "--max-batch=256",  # as the simulator's: what bounds a device is its time
            "--drain-s=2",
        ]


def make_plan(options: argparse.Namespace) -> Plan:
    """Return what the flags ask for. Raises AegaeonError."""
    names = tuple(f"model-{number:04d}" for number in range(options.models))
    (spec,) = served_models(Settings(models=(options.model,), models_dir=str(options.models_dir)))
    step_s, weight_gb = options.step_ms / 1e3, spec.weight_bytes / 1e9
    cost = ModelCost(
        weight_gb=weight_gb,
        kv_gb_per_token=0.0,
        max_len=spec.context_tokens,
        prefill=(2e-4, 0.0, step_s / 2),
        decode=(0.0, step_s / 10, step_s),
    )
    costs = Costs(
        link_gb_per_s=weight_gb / 0.1,  # a model is there after so long
        device_memory_gb=2.0 * len(names) * weight_gb,  # all fit
        models=dict.fromkeys(names, cost),
        model_mix=names,
    )
    target = Target(options.slo_ttft_s, options.slo_tbt_s)
    where = (options.model, options.models_dir.absolute())
    return Plan(names, *where, costs, target, options.horizon_s, options.seed)


def predicted(plan: Plan, nodes: int, rate: float) -> float:
    """Return the share of the requests that the simulator says are kept on so many nodes."""
    load, costs = plan.load(rate), plan.costs
    mean_prompt, mean_output = (sum(part) / len(LENGTHS) for part in zip(*LENGTHS, strict=True))
    flow = Flow(rate / len(plan.names), mean_prompt, mean_output)
    setup = Setup(
        policy=POLICIES["slack"],
        target=plan.target,
        costs=costs,
        models=costs.models,
        nodes=[
            node_of(f"node-{number}", costs, 1, costs.device_memory_gb, 10.0)
            for number in range(nodes)
        ],
    )
    run = simulate_nodes(load, setup, dict.fromkeys(plan.names, flow))
    return kept(run.served, plan.target)


def kept(served: Sequence[Served], target: Target) -> float:
    """Return the share of the requests that had what was promised."""
    return attainment(served, target).request


def climb(share_at: Callable[[float], float], first: float, step: float) -> dict[float, float]:
    """Return the shares kept at rates, from `first` on by factors of `step`: down to one that is
    kept and up to one that is not, so that goodput lies between two of them. Raises ServerError."""
    found = {first: share_at(first)}
    while len(found) < MOST_RATES:
        low, high = min(found), max(found)
        if found[low] < LEAST:
            found[low / step] = share_at(low / step)
        elif found[high] >= LEAST:
            found[high * step] = share_at(high * step)
        else:
            return found
    raise ServerError(f"{MOST_RATES} rates from {min(found):.3g}/s to {max(found):.3g}/s, no knee")


def predicted_goodput(plan: Plan, nodes: int, step: float) -> float:
    """Return the goodput that the simulator says, found by the rates of a search as live."""

    def share_at(rate: float) -> float:
        return predicted(plan, nodes, rate)

    rough = goodput(climb(share_at, float(nodes), 2.0).items(), LEAST)
    assert rough is not None
    return goodput(climb(share_at, rough / step, step).items(), LEAST) or 0.0


@contextlib.contextmanager
def ray_cluster(nodes: int) -> Iterator[str]:
    """Yield the address of a cluster of so many nodes and a head that computes nothing."""
    cluster_of = import_module("ray.cluster_utils").Cluster
    bounds = {"object_store_memory": OBJECT_BYTES, "include_dashboard": False}
    cluster: Any = cluster_of(initialize_head=True, head_node_args={"num_cpus": 0, **bounds})
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=2, object_store_memory=OBJECT_BYTES)
        yield str(cluster.address)
    finally:
        cluster.shutdown()


@dataclass
class Live:
    """A server on a cluster, as the rates of a search ask for it."""

    plan: Plan
    url: str
    nodes: int
    busiest: float = 0.0  # share of the processors' time that all of it took, at any rate
    late_s: float = 0.0  # the generator, by p99, at any rate

    def share_at(self, rate: float) -> float:
        """Serve a load and return what share was kept. Raises ServerError, StreamError."""
        plan = self.plan
        load = plan.load(rate)
        progress(f"{self.nodes} nodes, {rate:.3g} requests/s, {len(load)} requests")
        options = argparse.Namespace(
            seed=plan.seed, patience_s=PATIENCE_S, horizon_s=plan.horizon_s
        )
        server = Server("aegaeon", self.url, Ask())
        before_s, began_s = processor_s(), time.monotonic()
        run = uvloop.run(measure(server, plan.names, rate, load, options))
        share = (processor_s() - before_s) / (time.monotonic() - began_s) / processors()
        self.busiest = max(self.busiest, share)
        self.late_s = max(self.late_s, run.punctuality.send_p99_s)
        found = kept(run.served, plan.target)
        progress(f"  {100 * found:.1f} % kept; {_told(run)}")
        return found


def _told(run: Run) -> str:
    """What a run came to, for people."""
    first = [time_to_first_token_s(one.arrival_s, one.token_times_s) for one in run.served]
    between = [gap for one in run.served for gap in times_between_tokens_s(one.token_times_s)]
    words = [
        f"{name} p90 {summary.p90:.3f} s"
        for name, summary in (
            ("TTFT", summarize(one for one in first if one is not None)),
            ("TBT", summarize(between)),
        )
        if summary.p90 is not None
    ]
    return ", ".join(words + [f"{count} x {error}" for error, count in run.errors.items()])


def serve_on(plan: Plan, nodes: int, first: float, step: float) -> tuple[dict[float, float], Live]:
    """Return what was kept at which rates by a server of so many nodes. Raises ServerError."""
    with (
        tempfile.TemporaryDirectory(prefix="aegaeon-nodes-") as directory,
        tempfile.TemporaryFile("w+", prefix="aegaeon-nodes-") as log,
        own_redis() as redis_url,
        ray_cluster(nodes) as address,
    ):
        assert redis_url is not None  # or nothing would be served
        costs_file = Path(directory) / "costs.json"
        costs_file.write_bytes(msgspec.json.encode(plan.costs))
        try:
            with running_server(plan.flags(address, redis_url, costs_file), log) as url:
                live = Live(plan, url, nodes)
                return climb(live.share_at, first, step), live
        except ServerError:
            log.seek(0)
            sys.stderr.writelines(log.readlines()[-20:])
            raise


def run(plan: Plan, step: float, is_simulated: bool) -> Iterator[Row]:
    """Yield the rows. Raises ServerError, StreamError."""
    said: dict[int, float] = {}
    ours: dict[int, float] = {}
    for nodes in NODES:
        progress(f"simulating {nodes} nodes")
        said[nodes] = predicted_goodput(plan, nodes, step)
    for nodes in () if is_simulated else NODES:
        # One step below what is predicted: kept, if that is right.
        shares, live = serve_on(plan, nodes, said[nodes] / step, step)
        ours[nodes] = goodput(shares.items(), LEAST) or 0.0
        yield from _rows_of(nodes, shares, live, ours[nodes], said[nodes])
    for what, of in (("served", ours), ("predicted", said)):
        if of:
            row = Row(case=f"goodput of two nodes by that of one, {what}", unit="x", ours=1.0)
            row = msgspec.structs.replace(row, ours=of[2] / of[1])
            yield measured(row, Aim("ours", AIM, f">= {AIM:g}"))


def _rows_of(
    nodes: int, shares: dict[float, float], live: Live, ours: float, said: float
) -> Iterator[Row]:
    where = f"{nodes} node{'s' if nodes > 1 else ''}"
    for rate, share in sorted(shares.items()):
        told = predicted(live.plan, nodes, rate)
        case = f"kept at {rate:.3g} requests/s, {where}"
        yield measured(Row(case=case, unit="", ours=share, peer="simulator", peer_value=told))
    row = Row(
        case=f"goodput, {where}", unit="requests/s", ours=ours, peer="simulator", peer_value=said
    )
    yield measured(row)
    yield Row(case=f"processors that it took at most, {where}", unit="share", ours=live.busiest)
    row = Row(case=f"generator late by p99 at most, {where}", unit="ms", ours=1e3 * live.late_s)
    yield measured(row, Aim("ours", LATE_MS, f"<= {LATE_MS:g} ms", is_least=False))


def processors() -> int:
    """Return how many there are for us."""
    return len(os.sched_getaffinity(0))


def processor_s() -> float:
    """Return the processor time so far of this process and of all that come from it and live."""
    spent_s: dict[int, float] = {}
    parents: dict[int, int] = {}
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            words = file.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            pid = int(file.parent.name)
            parents[pid], spent_s[pid] = int(words[1]), tick_s * (int(words[11]) + int(words[12]))
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return sum(spent_s.get(pid, 0.0) for pid in ours)


def missing() -> str:
    """Say what a live run lacks here; empty: nothing."""
    try:
        import_module("ray.cluster_utils")
    except ImportError:
        return "nothing was served: Ray is not installed; run: pip install 'aegaeon[ray]'"
    with own_redis() as url:
        return "" if url else "nothing was served: redis-server is not installed"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models-dir", type=Path, default=Path("models"), help="default: models")
    add("--model", default="SmolLM2-135M-Instruct", help="whose tokenizer reads the prompts")
    add("--models", type=int, default=4, help="names of it (default: 4)")
    add("--step-ms", type=float, default=40.0, help="of a decode step, at least (default: 40)")
    add("--slo-ttft-s", type=float, default=4.0, help="promised first token (default: 4)")
    add("--slo-tbt-s", type=float, default=0.5, help="promised between tokens (default: 0.5)")
    add("--horizon-s", type=float, default=30.0, help="of a load (default: 30)")
    add("--step", type=float, default=1.15, help="from rate to rate (default: 1.15)")
    add("--seed", type=int, default=0, help="of the requests")
    add("--simulated", action="store_true", help="serve nothing, only predict")
    add("--json", action="store_true", help="print JSON instead of a table")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    options = make_parser().parse_args(arguments)
    if options.step <= 1 or options.models < 1:
        print("cluster_nodes: error: --step is above 1, --models at least 1", file=sys.stderr)
        return 2
    allow_connections()
    lacking = "" if options.simulated else missing()
    try:
        rows = list(run(make_plan(options), options.step, options.simulated or bool(lacking)))
    except (AegaeonError, ServerError, StreamError, OSError) as error:
        print(f"cluster_nodes: error: {error}", file=sys.stderr)
        return 1
    publish("Two nodes beside one", rows, options.json, (lacking,) if lacking else ())
    return 0


if __name__ == "__main__":
    sys.exit(main())
