"""A node without processes: runtimes of any role over a local store, one shared fake KV pool, and a
proxy that follows its requests as the gateway does. Time stands still unless told."""

from aegaeon.engine.base import null_token
from aegaeon.errors import RingClosed
from aegaeon.instance.departures import GRACE_S
from aegaeon.instance.kv_share import KvShare
from aegaeon.instance.lanes import Lane
from aegaeon.instance.outbox import Outbox
from aegaeon.instance.presence import Presence
from aegaeon.instance.pulls import Pulls
from aegaeon.instance.runtime import Parts, Runtime
from aegaeon.instance.ways import OFFER_S, Ways
from aegaeon.proxy.generation import Generation, OpenRequest
from aegaeon.proxy.outbox import Target, target_of
from aegaeon.scheduler.dispatch import LiveDispatcher
from aegaeon.scheduler.places import HomeDispatcher
from aegaeon.store.codec import decode_instance_message, decode_replies, encode
from aegaeon.store.local import LocalDomain
from aegaeon.types import (
    Accepted,
    Cancel,
    Declined,
    InstanceRecord,
    Moved,
    RequestFailed,
    SamplingParams,
    Submit,
    Transfer,
)
from tests.support.policies import make_scheduler
from tests.support.pooled import Pool, PooledEngine
from tests.support.specs import make_spec

MODELS = ("a", "b")
LEASE_S = 8.0


class HeldLane(Lane):
    """Runs an action when told to; then the outcome can be taken."""

    def __init__(self, run):
        self.run, self.action, self.outcome = run, None, None

    @property
    def is_busy(self):
        return self.action is not None

    def start(self, action):
        assert self.action is None
        self.action = action

    def finish(self):
        if self.action is not None and self.outcome is None:
            self.outcome = self.run(self.action)

    def take(self):
        outcome, self.outcome = self.outcome, None
        if outcome is not None:
            self.action = None
        return outcome

    def close(self, timeout_s):
        return True


class Life:
    """One life of an instance."""

    def __init__(self, node: "Node", name: str, role: str, incarnation: int) -> None:
        where = node.places.get(name, "")
        self.node, self.pool = node, node.pools.setdefault(where, Pool())
        self.name, self.role, self.incarnation = name, role, incarnation
        self.address = f"{name}.{incarnation}"
        self.inbox = node.domain.create_mailbox(self.address)
        self.engine = PooledEngine(node.specs, self.pool, node.quota)
        self.compute = HeldLane(self.engine.execute)
        self.copy = HeldLane(self.engine.load)
        record = InstanceRecord(
            id=name,
            incarnation=incarnation,
            role=role,
            device="null",
            mailbox=self.address,
            pid=1,
            models=MODELS,
            node=where,
        )
        self.ways = Ways(LiveDispatcher(HomeDispatcher()), self.engine)
        if where:
            self.ways.share = KvShare("127.0.0.1", self.ways.links)
            self.ways.pulls = Pulls(self.engine.bytes, self.inbox.wake)
        sizes = {spec.id: spec.weight_bytes for spec in node.specs}
        self.scheduler = make_scheduler("slack", sizes, 1000, role)
        self.runtime = Runtime(
            Parts(
                inbox=self.inbox,
                outbox=Outbox(node.domain.open_mailbox),
                presence=Presence(node.domain.metadata(), record, LEASE_S, lambda: node.now),
                engine=self.engine,
                scheduler=self.scheduler,
                ways=self.ways,
                compute=self.compute,
                copy=self.copy,
                clock=lambda: node.now,
                pause=lambda _: None,
            ),
            drain_s=5.0,
        )

    def turn(self) -> None:
        self.runtime.run_once(0.0)

    def finish(self) -> None:
        self.compute.finish()
        self.copy.finish()
        self.await_kv()

    def await_kv(self) -> None:
        """What comes from other nodes takes no time here."""
        pulls = [] if self.ways.pulls is None else self.ways.pulls._pulls.values()
        for pull in pulls:
            pull.thread.join(20.0)

    def close(self) -> None:
        """End what has threads and sockets."""
        for end in (self.ways.pulls, self.ways.share):
            if end is not None:
                end.close()


class Node:
    """Instances by name, their roles given; `proxy` asks and listens. Those with `places` are on
    nodes of these names, which have no memory in common: `close` it then."""

    def __init__(
        self, quota: int = 1 << 30, places: dict[str, str] | None = None, **roles: str
    ) -> None:
        self.now = 100.0
        self.quota = quota
        self.domain = LocalDomain(lambda: self.now)
        self.specs = tuple(make_spec(model) for model in MODELS)
        self.places = places or {}
        self.pools: dict[str, Pool] = {"": Pool()}
        self.pool = self.pools[""]
        self.roles = roles
        self.lives: dict[str, Life | None] = {}
        self.incarnations = 0
        self.proxy = Proxy(self)
        for name in roles:
            self.start(name)

    def start(self, name: str) -> None:
        """Begin a life of a dead instance, as the supervisor does."""
        if self.lives.get(name) is None:
            self.incarnations += 1
            self.lives[name] = Life(self, name, self.roles[name], self.incarnations)

    def kill(self, name: str) -> None:
        """SIGKILL, noticed at once: row and mailbox go, its blocks are anybody's."""
        life, self.lives[name] = self.lives[name], None
        if life is not None:
            self.domain.metadata().remove_instance(name, life.incarnation)
            self.domain.create_mailbox(life.address).close()
            life.pool.reclaim(life.engine.identity)
            life.close()

    def close(self) -> None:
        """End all lives."""
        for life in self.alive():
            life.close()

    def drop_answer(self, name: str, *kinds: type) -> bool:
        """Lose the first hand-off message (or of `kinds`) in an instance's mailbox."""
        life = self.lives[name]
        records = life.inbox._queue.records if life is not None else []
        for record in records:
            if isinstance(decode_instance_message(record), kinds or (Transfer, Accepted, Declined)):
                records.remove(record)
                return True
        return False

    def alive(self) -> list[Life]:
        return [life for life in self.lives.values() if life is not None]

    def rows(self):
        return self.domain.metadata().sync_for_routing()

    def step(self, dt_s: float = 0.03) -> None:
        """Everything has its turn once."""
        self.now += dt_s
        for life in self.alive():
            life.turn()
            life.finish()
        self.proxy.pump()

    def work(self, steps: int = 40) -> None:
        for _ in range(steps):
            self.step()


class Proxy:
    """The gateway without its loop and threads; `got` are the tokens of each request."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.mailbox = node.domain.create_mailbox("proxy")
        self.dispatcher = LiveDispatcher(HomeDispatcher())
        self.opened: dict[str, OpenRequest] = {}
        self.got: dict[str, list[int]] = {}
        self.replies: list[object] = []

    def ask(self, name: str, model: str = "a", max_tokens: int = 6, timeout_s: float = 1e6) -> None:
        generation = Generation(
            model=model,
            prompt_token_ids=(1, 2, len(name)),
            sampling=SamplingParams(temperature=0.0),
            max_tokens=max_tokens,
        )
        now = self.node.now
        self.opened[name] = OpenRequest(name, generation, now, now + timeout_s)
        self.got[name] = []

    def leave(self, name: str) -> None:
        opened = self.opened.pop(name, None)
        if opened is not None and opened.target is not None:
            self.send(opened.target, Cancel(name, opened.attempt))

    def expected(self, opened: OpenRequest) -> list[int]:
        request = opened.next_request("proxy", self.node.now)
        return [null_token(request, k, 1000) for k in range(request.max_tokens)]

    def send(self, target: Target, message: object) -> bool:
        try:
            self.node.domain.open_mailbox(f"{target[0]}.{target[1]}").send(encode(message))
        except RingClosed:
            return False
        return True

    def pump(self) -> None:
        for record in self.mailbox.receive(0.0):
            for reply in decode_replies(record):
                self.take(reply)
        rows = self.node.rows()
        alive = {target_of(row) for row in rows}
        for opened in self.opened.values():
            if opened.target is not None and opened.target not in alive:
                opened.target = None
                opened.lose()
            if opened.target is None and not opened.has_ended:
                self.place(opened, rows)

    def take(self, reply: object) -> None:
        self.replies.append(reply)
        opened = self.opened.get(reply.request_id)
        if isinstance(reply, Moved):
            target = Target(reply.instance, reply.incarnation)
            if opened is None or not opened.is_moved_by(reply):
                self.send(target, Cancel(reply.request_id, reply.attempt))
            else:
                opened.target = target
        elif opened is not None:
            if opened.take_in(reply, self.node.now):
                target, opened.target = opened.target, None
                if target is not None and not opened.has_ended:
                    self.send(target, Cancel(opened.id, reply.attempt))
            delta = opened.take()
            if delta is not None:
                self.got[opened.id].extend(delta.token_ids)

    def place(self, opened: OpenRequest, rows) -> None:
        rows = tuple(row for row in rows if target_of(row) not in opened.refused)
        choice = self.dispatcher.dispatch(rows, opened.generation.model, {})
        chosen = None if choice is None else choice.instance
        row = next((row for row in rows if row.record.id == chosen), None)
        submit = Submit(opened.next_request("proxy", self.node.now))
        if row is not None and self.send(target_of(row), submit):
            opened.placed(target_of(row), opened.attempt)

    def failures(self) -> list[RequestFailed]:
        return [reply for reply in self.replies if isinstance(reply, RequestFailed)]


def assert_served(node):
    proxy = node.proxy
    for name, opened in proxy.opened.items():
        assert opened.error is None, (name, opened.error)
        assert proxy.got[name] == proxy.expected(opened), name
    assert_empty(node)


def assert_empty(node):
    for life in node.alive():
        snapshot = life.scheduler.snapshot()
        assert not snapshot.waiting and not snapshot.running
        assert life.engine.usage().kv_bytes == 0
    assert all(pool.owner == {} for pool in node.pools.values())


def until(node, claim, steps=200, dt_s=0.03):
    for _ in range(steps):
        if claim():
            return
        node.step(dt_s)
    raise AssertionError("it did not come to that")


def settle(node, steps=400):
    until(node, lambda: all(opened.has_ended for opened in node.proxy.opened.values()), steps)
    node.work(int((OFFER_S + GRACE_S) / 0.03) + 10)
