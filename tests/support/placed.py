"""Nodes and models that come and go, by rows that tests write, under a controller's placement."""

from collections import defaultdict

import msgspec

from aegaeon.cluster.placing import Placing, Seen
from aegaeon.cluster.plan import MemberPlan
from aegaeon.config import check_settings
from aegaeon.figures import (
    DeviceFigures,
    Histogram,
    InstanceFigures,
    ModelFigures,
    ProxyFigures,
    encode_figures,
)
from aegaeon.nodes import NodeNow
from aegaeon.specs import Catalog
from aegaeon.types import Instance, InstanceRecord, InstanceStatus
from tests.support.specs import make_spec

EPOCH_S = 60.0
STEP = (
    0.0,
    0.002,
    0.02,
)  # of decoding: 20 ms, and 2 ms for each sequence; one a 100 ms is promised


def make_row(node, models, state="ready", **status):
    record = InstanceRecord(
        id=f"instance-{node}", incarnation=1, role="colocated", device="null", mailbox="", pid=1,
        models=tuple(models), node=node,
    )  # fmt: skip
    return Instance(record, InstanceStatus(state=state, **status))


class Town:
    """Nodes whose instances do at once what the catalogue says, unless a test holds them."""

    def __init__(self, models, nodes="abc", weight=100, **cluster):
        cluster = {"replicas": 1, "rebalance_s": EPOCH_S, **cluster}
        self.settings = check_settings(
            {"cluster": cluster, "device": "null", "slo_tbt_s": 0.1, "colocated_count": 1}
        )
        self.placing = Placing(self.settings)
        specs = tuple(make_spec(model, weight) for model in models)
        self.catalog = Catalog(version=1, models=specs)
        self.nodes = dict.fromkeys(nodes, 1)
        self.labels = {}
        self.slow = set()  # nodes that serve nothing new
        self.busy = {}  # requests left, by node and model
        self.serves = {node: set() for node in nodes}
        self.wanted = defaultdict(set)
        self.refuses = {}  # models that nodes cannot serve
        self.followed = 0  # the version of the catalogue that instances have seen
        self.silent, self.down = set(), set()  # without an answer; without rows
        self.now = 0.0
        self.counts = {}

    def rows(self):
        return tuple(
            make_row(
                node,
                sorted(self.serves[node]),
                running=self.busy.get(node, {}),
                catalog=self.followed,
                refused=self.refused(node),
            )
            for node in self.nodes
            if node not in self.down
        )

    def refused(self, node):
        """What an instance says: nothing of what it is not asked for (any more)."""
        return dict.fromkeys(self.refuses.get(node, set()) & self.wanted[node], "no budget")

    def seen(self):
        nodes = [NodeNow(id=n, address="", labels=self.labels.get(n, {})) for n in self.nodes]
        plans = [
            MemberPlan(name=f"instance-{n}", kind="instance", node=n, settings=self.settings)
            for n in self.nodes
        ]
        silent = {f"instance-{node}" for node in self.silent}
        return Seen.of(nodes, plans, self.rows(), silent, ())

    def turn(self, passed_s=0.5):
        """A turn of the controller, then one of the instances; return whether it was published."""
        self.now += passed_s
        placement = self.placing.look(self.catalog, self.seen(), self.now)
        if placement is not None:
            version = self.catalog.version + 1
            self.catalog = msgspec.structs.replace(
                self.catalog, placement=placement, version=version
            )
        for node in self.nodes:
            wanted = self.wanted[node] = {spec.id for spec in self.catalog.on(node)}
            wanted = wanted - self.refuses.get(node, set())
            self.serves[node] &= wanted
            if node not in self.slow | self.down:
                self.serves[node] = wanted
        self.followed = self.catalog.version
        return placement is not None

    def settle(self, turns=6):
        for _ in range(turns):
            self.turn()

    def come(self, requests_per_s, seconds, output=20):
        """Requests come, by model, for so long, and proxies tell of them."""
        for _ in range(int(seconds / 5)):
            self.now += 5.0
            for model, rate in requests_per_s.items():
                known = self.counts.setdefault(model, [0, 0, 0])
                new = (rate * 5, rate * 5 * 10, rate * 5 * output)
                self.counts[model] = [a + b for a, b in zip(known, new, strict=True)]
            models = {
                model: ModelFigures(
                    request=Histogram([round(n), *[0] * 19]),
                    prompt_tokens=round(p),
                    generated_tokens=round(g),
                )
                for model, (n, p, g) in self.counts.items()
            }
            steps = {m: DeviceFigures(prefill=(1e-6, 0.0, 1e-4), decode=STEP) for m in models}
            self.placing.demands.note(
                {
                    "proxy-0": encode_figures(ProxyFigures(models=models)),
                    "instance-a": encode_figures(InstanceFigures(models=steps)),
                    "instance-a.deaths": b"something else",
                },
                self.now,
            )

    def where(self):
        return {model: abode.nodes for model, abode in self.catalog.placement.abodes.items()}

    def unserved(self):
        serving = {m for node in self.serves if node not in self.down for m in self.serves[node]}
        return {spec.id for spec in self.catalog.models} - serving
