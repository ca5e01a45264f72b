"""An instance's runtime on a bench: a local domain, a NullEngine, lanes that end when told."""

from aegaeon.engine.base import NullEngine
from aegaeon.instance.outbox import Outbox
from aegaeon.instance.presence import Presence
from aegaeon.instance.runtime import Parts, Runtime
from aegaeon.instance.ways import Ways
from aegaeon.scheduler.dispatch import LiveDispatcher
from aegaeon.scheduler.places import HomeDispatcher
from aegaeon.store.codec import decode_replies, encode
from aegaeon.store.local import LocalDomain
from aegaeon.types import (
    InstanceRecord,
    Submit,
)
from tests.support.node import HeldLane
from tests.support.policies import make_scheduler
from tests.support.specs import make_request, make_spec


class Bench:
    """A runtime on a bench, with the proxy's end of its mailboxes."""

    def __init__(self, models=("a", "b"), budget_bytes=1000, lease_s=8.0, **options):
        self.now = 0.0
        specs = tuple(make_spec(model) for model in models)
        self.domain = LocalDomain(lambda: self.now)
        self.engine = NullEngine(specs, pause=lambda _: None)
        self.compute = HeldLane(self.engine.execute)
        self.copy = HeldLane(self.engine.load)
        self.inbox = self.domain.create_mailbox("i.1")
        self.proxy = self.domain.create_mailbox("proxy")
        record = InstanceRecord(
            id="i",
            incarnation=1,
            role="colocated",
            device="null",
            mailbox="i.1",
            pid=1,
            models=models,
        )
        self.store = self.domain.metadata()
        sizes = {spec.id: spec.weight_bytes for spec in specs}
        self.runtime = Runtime(
            Parts(
                inbox=self.inbox,
                outbox=Outbox(self.domain.open_mailbox),
                presence=Presence(self.store, record, lease_s, lambda: self.now),
                engine=self.engine,
                scheduler=make_scheduler("slack", sizes, budget_bytes, **options),
                ways=Ways(LiveDispatcher(HomeDispatcher()), self.engine),
                compute=self.compute,
                copy=self.copy,
                clock=lambda: self.now,
                pause=lambda _: None,
            ),
            drain_s=5.0,
        )

    def send(self, message):
        self.domain.open_mailbox("i.1").send(encode(message))

    def submit(self, request_id, model="a", **changes):
        request = make_request(request_id, model, **changes)
        self.send(Submit(request))
        return request

    def turn(self):
        self.runtime.run_once(0.0)

    def work(self, turns=40):
        """Let both lanes finish whatever they are given."""
        for _ in range(turns):
            self.now += 0.001
            self.turn()
            self.compute.finish()
            self.copy.finish()

    def until(self, kind):
        """Stop when an action of that kind is under way."""
        for _ in range(20):
            self.turn()
            if isinstance(self.compute.action, kind):
                return
            self.compute.finish()
            self.copy.finish()
        raise AssertionError(f"no {kind}")

    def replies(self):
        return [one for record in self.proxy.receive(0.0) for one in decode_replies(record)]

    def status(self):
        """What is published, a moment later: changes go out at a bounded rate."""
        self.now += 0.1
        self.turn()
        return self.store.sync_for_routing()[0].status

    def held_kv(self):
        return self.engine.usage().kv_bytes
