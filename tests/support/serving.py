"""A bench whose models are those of the catalogue, over scripted lanes and every policy."""

import msgspec

from aegaeon.config import check_settings
from aegaeon.engine.base import NullEngine
from aegaeon.instance.launch import Launch
from aegaeon.instance.outbox import Outbox
from aegaeon.instance.presence import Presence
from aegaeon.instance.runtime import Parts, Runtime
from aegaeon.instance.served import LOOK_S, Served
from aegaeon.instance.ways import Ways
from aegaeon.instance.worker import build_deciding
from aegaeon.placements import Abode, Placement
from aegaeon.scheduler.dispatch import LiveDispatcher
from aegaeon.scheduler.places import HomeDispatcher
from aegaeon.types import InstanceRecord
from tests.support.bench import Bench
from tests.support.node import HeldLane
from tests.support.specs import make_spec

BUDGET = 350  # three models of 100
RECORD = InstanceRecord(
    id="i",
    incarnation=2,
    role="colocated",
    device="null",
    mailbox="i.1",
    pid=1,
    models=("a",),
)


class ServingBench(Bench):
    """A bench whose models are those of the catalogue."""

    def __init__(self, policy="slack", node="", view=lambda store: store, **settings):
        super().__init__(models=("a",))
        specs = (make_spec("a"),)
        chosen = check_settings({"policy": policy, "device": "null", **settings})
        launch = Launch(
            settings=chosen, specs=specs, instance="i", index=0, incarnation=2, status_fd=0,
            parent_pid=0, node=node,
        )  # fmt: skip
        self.engine = NullEngine(specs, pause=lambda _: None)
        self.compute, self.copy = HeldLane(self.engine.execute), HeldLane(self.engine.load)
        self.deciding = deciding = build_deciding(launch, BUDGET)
        self.scheduler = deciding.scheduler
        presence = Presence(self.store, RECORD, 8.0, lambda: self.now)
        self.catalog = self.domain.catalog()
        self.catalog.change(lambda before: before.with_model(specs[0]))
        self.runtime = Runtime(
            Parts(
                inbox=self.inbox,
                outbox=Outbox(self.domain.open_mailbox),
                presence=presence,
                engine=self.engine,
                scheduler=deciding.scheduler,
                ways=Ways(LiveDispatcher(HomeDispatcher()), self.engine),
                compute=self.compute,
                copy=self.copy,
                clock=lambda: self.now,
                pause=lambda _: None,
                served=Served(launch, view(self.catalog), self.engine, presence, deciding),
            ),
            drain_s=5.0,
        )

    def add(self, name, **changes):
        spec = msgspec.structs.replace(make_spec(name), **changes)
        self.catalog.change(lambda before: before.with_model(spec))

    def remove(self, name):
        self.catalog.change(lambda before: before.without_model(name))

    def place(self, **homes):
        """Have models live on these nodes, each a letter."""
        abodes = {model: Abode(tuple(nodes)) for model, nodes in homes.items()}
        placement = Placement(rule="load", abodes=abodes)
        self.catalog.change(lambda before: msgspec.structs.replace(before, placement=placement))

    def row(self):
        self.now += 2 * LOOK_S
        self.turn()
        self.status()
        (row,) = self.store.sync_for_routing()
        return row

    def groups(self):
        return set(self.deciding.scheduler._groups)

    def clocks(self):
        return set(self.runtime._requests.waits._clocks)

    def ended(self, request_id):
        replies = [reply for reply in self.replies() if reply.request_id == request_id]
        return replies[-1]
