"""A cluster without processes: an instance with a null engine on each of some nodes, a controller's
placement, and a proxy that routes among them, over one local store. Time stands still unless told.
"""

import msgspec

from aegaeon.cluster.placing import Placing, Seen
from aegaeon.cluster.plan import MemberPlan
from aegaeon.config import check_settings
from aegaeon.engine.base import NullEngine
from aegaeon.figures import (
    DeviceFigures,
    Histogram,
    InstanceFigures,
    ModelFigures,
    ProxyFigures,
    encode_figures,
)
from aegaeon.instance.launch import Launch
from aegaeon.instance.outbox import Outbox
from aegaeon.instance.presence import Presence
from aegaeon.instance.runtime import Parts, Runtime
from aegaeon.instance.served import Served
from aegaeon.instance.ways import Ways
from aegaeon.instance.worker import build_deciding
from aegaeon.nodes import NodeNow
from aegaeon.scheduler.among import NodeDispatcher
from aegaeon.scheduler.dispatch import LiveDispatcher
from aegaeon.scheduler.places import HomeDispatcher
from aegaeon.specs import Catalog
from aegaeon.store.local import LocalDomain
from aegaeon.types import InstanceRecord
from tests.support.node import HeldLane, Proxy
from tests.support.specs import make_spec

LEASE_S = 8.0
EPOCH_S = 20.0
BUDGET_BYTES = 350  # three models
STEP = (0.0, 0.002, 0.02)  # of decoding, as all instances tell


class Dweller:
    """One life of the instance of a node."""

    def __init__(self, town: "Town", node: str, incarnation: int) -> None:
        self.node, self.incarnation = node, incarnation
        self.address = f"instance-{node}.{incarnation}"
        catalog = town.catalog.read()
        launch = Launch(
            settings=town.settings,
            specs=catalog.on(node),
            instance=f"instance-{node}",
            index=0,
            incarnation=incarnation,
            status_fd=0,
            parent_pid=0,
            catalog=catalog.version,
            node=node,
        )
        self.engine = NullEngine(launch.specs, pause=lambda _: None)
        self.compute = HeldLane(self.engine.execute)
        self.copy = HeldLane(self.engine.load)
        deciding = build_deciding(launch, BUDGET_BYTES)
        record = InstanceRecord(
            id=launch.instance, incarnation=incarnation, role="colocated", device="null",
            mailbox=self.address, pid=1, models=tuple(s.id for s in launch.specs), node=node,
        )  # fmt: skip
        presence = Presence(town.domain.metadata(), record, LEASE_S, lambda: town.now)
        self.runtime = Runtime(
            Parts(
                inbox=town.domain.create_mailbox(self.address),
                outbox=Outbox(town.domain.open_mailbox),
                presence=presence,
                engine=self.engine,
                scheduler=deciding.scheduler,
                ways=Ways(LiveDispatcher(HomeDispatcher()), self.engine),
                compute=self.compute,
                copy=self.copy,
                clock=lambda: town.now,
                pause=lambda _: None,
                served=Served(launch, town.catalog, self.engine, presence, deciding),
            ),
            drain_s=5.0,
        )

    def turn(self) -> None:
        self.runtime.run_once(0.0)
        self.compute.finish()
        self.copy.finish()


class Town:
    """Nodes by letters; `proxy` asks and listens, `figures` is what it has told on the board."""

    def __init__(self, models: str, nodes: str, **cluster) -> None:
        self.now = 100.0
        settings = {"replicas": 1, "rebalance_s": EPOCH_S, **cluster}
        self.settings = check_settings(
            {"cluster": settings, "device": "null", "colocated_count": 1, "slo_tbt_s": 0.1}
        )
        self.domain = LocalDomain(lambda: self.now)
        self.catalog = self.domain.catalog()
        specs = tuple(make_spec(model) for model in models)
        self.catalog.change(lambda _: Catalog(models=specs))
        self.placing = Placing(self.settings)
        self.planned = list(nodes)
        self.alive: dict[str, Dweller] = {}
        self.lives = 0
        self.rates: dict[str, float] = {}
        self.counts: dict[str, float] = {}
        self.proxy = Proxy(self)
        self.proxy.dispatcher = NodeDispatcher(HomeDispatcher)
        self.control()
        for node in nodes:
            self.begin(node)
        self.work(20)

    def begin(self, node: str) -> None:
        """Start the node's instance, if it does not live; the node joins, if it was not there."""
        if node not in self.planned:
            self.planned.append(node)
        if node not in self.alive:
            self.lives += 1
            self.alive[node] = Dweller(self, node, self.lives)

    def lose(self, node: str) -> None:
        """Take a node away with all that is there; as the controller does, its row, too."""
        self.planned.remove(node)
        dweller = self.alive.pop(node)
        self.domain.metadata().remove_instance(f"instance-{node}", dweller.incarnation)
        self.domain.create_mailbox(dweller.address).close()

    def rows(self):
        return self.domain.metadata().sync_for_routing()

    def control(self) -> None:
        """A turn of the controller."""
        plans = [
            MemberPlan(name=f"instance-{n}", kind="instance", node=n, settings=self.settings)
            for n in self.planned
        ]
        nodes = [NodeNow(id=node, address="") for node in self.planned]
        if self.placing.wants_figures(self.now):
            self.placing.demands.note(self.records(), self.now)
        seen = Seen.of(nodes, plans, self.rows(), (), ())
        placement = self.placing.look(self.catalog.read(), seen, self.now)
        if placement is not None:
            self.catalog.change(lambda c: msgspec.structs.replace(c, placement=placement))

    def records(self) -> dict[str, bytes]:
        """What is on the board: as if requests had come at the `rates`."""
        steps = {model: DeviceFigures(prefill=STEP, decode=STEP) for model in self.rates}
        models = {
            model: ModelFigures(
                request=Histogram([round(count), *[0] * 19]),
                prompt_tokens=round(count) * 3,
                generated_tokens=round(count) * 20,
            )
            for model, count in self.counts.items()
        }
        records = {"proxy-0": encode_figures(ProxyFigures(models=models))}
        for node in self.alive:
            figures = InstanceFigures(models=steps, weight_budget_bytes=BUDGET_BYTES)
            records[f"instance-{node}"] = encode_figures(figures)
        return records

    def step(self, dt_s: float = 0.05) -> None:
        """Everything has its turn once."""
        self.now += dt_s
        for model, rate in self.rates.items():
            self.counts[model] = self.counts.get(model, 0.0) + rate * dt_s
        self.control()
        for dweller in tuple(self.alive.values()):
            dweller.turn()
        self.proxy.pump()

    def work(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def serving(self) -> dict[str, set[str]]:
        """The nodes that take requests, by model."""
        found: dict[str, set[str]] = {spec.id: set() for spec in self.catalog.read().models}
        for row in self.rows():
            for model in row.record.models:
                if row.status.state == "ready":
                    found.setdefault(model, set()).add(row.record.node)
        return found

    def where(self) -> dict[str, tuple[str, ...]]:
        """Where models live, by what is published."""
        placement = self.catalog.read().placement
        return {model: abode.nodes for model, abode in placement.abodes.items()}
