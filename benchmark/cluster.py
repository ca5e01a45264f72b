#!/usr/bin/env python3
"""Many machines, as far as one can measure them: how fast models are placed on nodes."""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

# Started by its path, Python looks beside this file and not in the root of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aegaeon.errors import AegaeonError
from aegaeon.flags import Parser
from aegaeon.metrics import Target
from aegaeon.scheduler.cost import Costs, ModelCost
from aegaeon.scheduler.demand import Flow
from aegaeon.scheduler.levels import Node
from aegaeon.scheduler.placement import Need, place
from aegaeon.scheduler.routing import Router
from aegaeon.sim.nodes import need_of, node_of
from aegaeon.sim.traces import popularity
from aegaeon.types import ModelId
from benchmark.report_rows import Aim, Row, measured, progress, publish

NODES, DEVICES_PER_NODE, MODELS = 1250, 8, 5000
REQUESTS_PER_S = 20_000.0
FLOW = (1200.0, 180.0)  # tokens of a prompt and an answer
ROUTED = 100_000
REPEATS = 3
# Like Qwen2.5-7B and Llama2-13B on an H100, as the Aegaeon artifact measured them.
COSTS = Costs(
    link_gb_per_s=16.0,
    device_memory_gb=80.0,
    models={
        "7b": ModelCost(14.0, 3.7e-4, 8192, (1.5e-5, 0.0, 0.016), (2.6e-7, 7.6e-5, 0.0086)),
        "13b": ModelCost(26.0, 7.6e-4, 4096, (4.1e-5, 0.0, 0.0075), (1.3e-7, 1.2e-4, 0.0125)),
    },
    model_mix=("7b", "7b", "7b", "7b", "13b"),
)


class FixedSite:
    """A node that always says the same."""

    load = 0.5

    def wait_s(self, model: ModelId) -> float:  # noqa: ARG002  part of the seam
        """No wait."""
        return 0.0

    def is_resident(self, model: ModelId) -> bool:  # noqa: ARG002
        """Yes."""
        return True


def fleet() -> tuple[list[Node], list[Need]]:
    """Return 10,000 devices, and what 5,000 models need of them."""
    nodes = [node_of(f"node-{n:05d}", COSTS, DEVICES_PER_NODE, 1000.0, 12.5) for n in range(NODES)]
    shares = popularity(MODELS, 1.0)
    kinds = COSTS.of(tuple(shares))
    needs = [
        need_of(model, kinds[model], Flow(REQUESTS_PER_S * share, *FLOW), Target())
        for model, share in shares.items()
    ]
    return nodes, needs


def placement() -> Iterator[Row]:
    """Yield how fast all models are placed, and how soon after a node is missed."""
    nodes, needs = fleet()
    name = f"{MODELS:,} models on {NODES * DEVICES_PER_NODE:,} devices of {NODES:,} nodes"
    progress(name)
    took_s, again_s, lost_s = [], [], []
    for _ in range(REPEATS):
        began_s = time.perf_counter()
        placed = place(nodes, needs, {})
        took_s.append(time.perf_counter() - began_s)
        began_s = time.perf_counter()
        again = place(nodes, needs, placed.where)
        again_s.append(time.perf_counter() - began_s)
        began_s = time.perf_counter()
        after = place(nodes[1:], needs, placed.where)
        lost_s.append(time.perf_counter() - began_s)
    assert not placed.left and not again.moves
    lost = sum(nodes[0].id in where for where in placed.where.values())
    row = Row(
        case=f"placement decisions, {name}",
        unit="decisions/s",
        ours=len(placed.moves) / min(took_s),
    )
    yield measured(row, Aim("ours", 1e4, ">= 10,000"))
    yield Row(
        case=f"busiest node's share of its time, {name}",
        unit="share",
        ours=max(placed.levels.values()),
    )
    mean = sum(placed.levels.values()) / NODES
    yield Row(case=f"mean share, {name}", unit="share", ours=mean)
    yield Row(case=f"a round that changes nothing, {name}", unit="s", ours=min(again_s))
    row = Row(case=f"a round after a node is lost, {name}", unit="s", ours=min(lost_s))
    yield measured(row, Aim("ours", 1.0, "< 1 s", is_least=False))
    yield Row(
        case="moves of it, beside models that the node had",
        unit="moves",
        ours=len(after.moves) - lost,
    )


def routing() -> Iterator[Row]:
    """Yield how fast requests find their node, whose model lives on few or on many."""
    for count in (1, 3, 100, NODES):
        progress(f"routing among {count} nodes")
        names = tuple(f"node-{n:05d}" for n in range(count))
        sites = {name: FixedSite() for name in names}
        router = Router()
        router.settle({"m": names})
        began_s = time.perf_counter()
        for _ in range(ROUTED):
            router.route("m", sites)
        took_s = time.perf_counter() - began_s
        row = Row(
            case=f"requests routed among {count} nodes of their model",
            unit="requests/s",
            ours=ROUTED / took_s,
        )
        yield measured(row, Aim("ours", 5e4, ">= 50,000"))


def make_parser() -> Parser:
    """Return the parser of the flags."""
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and publish; return the exit code."""
    try:
        options = make_parser().parse_args(arguments)
        publish("many machines", [*placement(), *routing()], options.json)
    except AegaeonError as error:
        print(f"cluster.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
