"""The instance's loop and the simulator take the same actions at the same times: the real runtime
with scripted lanes on a clock of its own, against the simulated device."""

import math
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aegaeon.engine.base import NullEngine
from aegaeon.instance.lanes import Lane
from aegaeon.instance.outbox import Outbox
from aegaeon.instance.presence import Presence
from aegaeon.instance.runtime import Parts, Runtime
from aegaeon.instance.ways import Ways
from aegaeon.metrics import Target, TokenRuns
from aegaeon.scheduler.cost import Costs, ModelCost
from aegaeon.scheduler.dispatch import LiveDispatcher
from aegaeon.scheduler.ledger import Limits
from aegaeon.scheduler.places import HomeDispatcher
from aegaeon.scheduler.policies import POLICIES, Fleet
from aegaeon.scheduler.residency import Residency
from aegaeon.sim.device import Device, Job
from aegaeon.sim.pace import Prices
from aegaeon.sim.timeline import Timeline
from aegaeon.store.codec import encode
from aegaeon.store.local import LocalDomain
from aegaeon.types import (
    Decode,
    Idle,
    InstanceRecord,
    KvHandle,
    Prefill,
    Submit,
    Switch,
    Transfer,
)
from tests.support.policies import LIVE
from tests.support.specs import make_request, make_spec

MODELS = ("a", "b", "c")
KINDS = {  # two small ones fit, or one large; whatever b does falls on ticks
    "a": ModelCost(1.0, 1e-3, 4096, (2.0**-12, 0.0, 2.0**-6), (2.0**-20, 2.0**-12, 2.0**-6)),
    "b": ModelCost(1.0, 1e-3, 4096, (2.0**-11, 0.0, 2.0**-5), (0.0, 0.0, 2.0**-5)),
    "c": ModelCost(2.0, 1e-3, 4096, (1e-3, 1e-7, 0.02), (3e-6, 1e-4, 0.07)),
}
COSTS = Costs(4.0, 2.5, KINDS, MODELS, switch_s=2.0**-6)
BUDGET_BYTES = 2_500_000_000
TICK_S = 2.0**-6  # arrivals fall on these, and so do many ends
SIZES = {model: round(cost.weight_gb * 1e9) for model, cost in KINDS.items()}

arrivals = st.lists(
    st.tuples(
        st.sampled_from([0, 0, 1, 2, 4, 17, 40, 400]),  # ticks since the one before
        st.sampled_from("aabbbc"),
        st.sampled_from([32, 64, 100, 960]),  # tokens of the prompt
        st.sampled_from([2, 3, 20, 130]),  # and of the answer
    ),
    min_size=1,
    max_size=20,
)


def make_scheduler(policy, role, tbt_s):
    limits = Limits(max_batch=3, max_running=5)
    fleet = Fleet(target=Target(1.0, tbt_s), limits=limits)
    return POLICIES[policy].scheduler(Residency(SIZES, BUDGET_BYTES), COSTS, fleet, role)


def requests_of(trace, role):
    at_s = 0.0
    for number, (ticks, model, prompt, answer) in enumerate(trace):
        at_s += ticks * TICK_S
        made = (0,) if role == "decode" else ()
        yield make_request(
            f"r{number}",
            model,
            prompt_token_ids=(1,) * prompt,
            generated_token_ids=made,
            max_tokens=answer,
            arrival_s=at_s,
            deadline_s=math.inf,
        )


class ClockLane(Lane):
    """An action takes what `took_s` says; then `run` says what came of it."""

    def __init__(self, clock, run, took_s, log):
        self.clock, self.run, self.took_s, self.log = clock, run, took_s, log
        self.action, self.ends_s = None, math.inf

    @property
    def is_busy(self):
        return self.action is not None

    def start(self, action):
        self.action = action
        self.ends_s = self.clock() + self.took_s(action)
        self.log(self.clock(), action)

    def take(self):
        if self.clock() < self.ends_s:
            return None
        action, self.action, self.ends_s = self.action, None, math.inf
        return self.run(action)

    def close(self, timeout_s):
        return True


class Log:
    """What each lane began, and when."""

    def __init__(self):
        self.computed, self.loaded, self.left = [], [], []

    def action(self, now, action):
        requests = () if isinstance(action, Switch) else action.requests
        most = action.max_tokens if isinstance(action, Prefill) else None
        self.computed.append((now, type(action).__name__, action.model, requests, most))

    def load(self, now, load):
        self.loaded.append((now, load.model, load.evict, load.offload, load.bring))


class Live:
    """The runtime of one instance, in the time of its events."""

    def __init__(self, policy, role, tbt_s):
        self.now, self.log, self.prices = 0.0, Log(), Prices(COSTS, KINDS)
        specs = tuple(make_spec(model, SIZES[model]) for model in MODELS)
        domain = LocalDomain(lambda: self.now)
        self.engine = NullEngine(specs, pause=lambda _: None)
        self.compute = self.lane(self.engine.execute, self.compute_s, self.log.action)
        self.copy = self.lane(
            self.engine.load, lambda load: self.prices.load_s(load.model), self.log.load
        )
        self.inbox = domain.create_mailbox("i.1")
        self.proxy = domain.create_mailbox("proxy")
        self.send = domain.open_mailbox("i.1").send
        names = {"device": "null", "mailbox": "i.1", "pid": 1}
        record = InstanceRecord(id="i", incarnation=1, role=role, models=MODELS, **names)
        self.runtime = Runtime(
            Parts(
                inbox=self.inbox,
                outbox=Outbox(domain.open_mailbox),
                presence=Presence(domain.metadata(), record, 1e9, lambda: self.now),
                engine=self.engine,
                scheduler=make_scheduler(policy, role, tbt_s),
                ways=Ways(LiveDispatcher(HomeDispatcher()), self.engine),
                compute=self.compute,
                copy=self.copy,
                clock=lambda: self.now,
                pause=lambda _: None,
            ),
            drain_s=5.0,
        )

    def lane(self, run, took_s, log):
        return ClockLane(lambda: self.now, run, took_s, log)

    def compute_s(self, action):
        match action:
            case Switch():
                return self.prices.switch_s
            case Prefill():
                starts = [self.engine._prefilled.get(request, 0) for request in action.requests]
                pairs = list(zip(action.requests, starts, strict=True))
                shares = action.shares(self.tokens_of(request) - at for request, at in pairs)
                spans = [(at, at + n) for at, n in zip(starts, shares, strict=True)]
                return self.prices.prefill_s(action.model, spans)
            case Decode():
                context = sum(self.tokens_of(request) for request in action.requests)
                steps = self.prices.steps(action.model)
                return steps.pace(0.0, context, len(action.requests)).end_s(1)

    def tokens_of(self, request):
        known = self.engine._requests[request]
        return len(known.prompt_token_ids) + self.engine._generated[request]

    def run(self, requests, role, looks=()):
        """Serve `requests`; at the times of `looks` the loop wakes up for nothing."""
        coming, looks = deque(requests), deque(looks)
        while True:
            dues = [self.compute.ends_s, self.copy.ends_s, self.runtime._idle_until_s or math.inf]
            if coming:
                dues.append(coming[0].arrival_s)
            if min(dues) == math.inf:
                return
            self.now = min(dues)
            if looks and looks[0] < self.now:
                self.now = looks.popleft()
            while coming and coming[0].arrival_s == self.now:
                self.send(encode(message_of(coming.popleft(), role, self.now)))
            self.runtime.run_once(0.0)
            self.proxy.receive(0.0)


def message_of(request, role, now):
    if role != "decode":
        return Submit(request)
    return Transfer(request, KvHandle(owner=0, blocks=(), cached_tokens=1), "proxy", now + 1.0)


class Logged(Device):
    """A simulated device that says what it does, step by step."""

    def __init__(self, scheduler):
        self.log, self.ended = Log(), []
        super().__init__(
            0, scheduler, Prices(COSTS, KINDS), Timeline(), self.on_end, lambda *_: None
        )

    def on_end(self, job, is_failed):
        self.ended.append((job, is_failed))

    def _begin_action(self, action, now):
        if not isinstance(action, Decode | Idle):
            self.log.action(now, action)
        super()._begin_action(action, now)

    def _begin_load(self, load, now):
        self.log.load(now, load)
        super()._begin_load(load, now)

    def _end_run(self, steps, now):
        action, pace = self._action, self._pace
        for step in range(steps):
            self.log.action(pace.end_s(step), action)
        super()._end_run(steps, now)


def simulate(policy, role, tbt_s, requests):
    device = Logged(make_scheduler(policy, role, tbt_s))
    coming = deque(requests)
    while coming or device.due_s < math.inf:
        now = min(device.due_s, coming[0].arrival_s if coming else math.inf)
        arrived = []
        while coming and coming[0].arrival_s == now:
            arrived.append(job_of(coming.popleft(), now))
        if role == "decode":
            device.tick(now, adopted=tuple(arrived))
        else:
            device.tick(now, arrived=tuple(arrived))
    return device


def job_of(request, now):
    job = Job(request, TokenRuns())
    if request.generated_token_ids:
        job.times_s.add(now, 0.0, 0.0, 1)
        job.context_tokens = len(request.prompt_token_ids) + 1
    return job


@pytest.mark.parametrize("role", ["colocated", "prefill", "decode"])
@pytest.mark.parametrize("policy", LIVE)
@settings(max_examples=60)
@given(
    arrivals,
    st.sampled_from([0.1, 2.0**-4, 0.02]),
    st.lists(st.integers(0, 1000).map(lambda ticks: ticks * TICK_S / 2), max_size=20).map(sorted),
)
def test_the_loop_and_the_simulator_take_the_same_actions_at_the_same_times(
    policy, role, trace, tbt_s, looks
):
    live = Live(policy, role, tbt_s)
    live.run(requests_of(trace, role), role, looks)
    simulated = simulate(policy, role, tbt_s, requests_of(trace, role))
    assert live.log.computed == simulated.log.computed
    assert live.log.loaded == simulated.log.loaded
    if role != "prefill":
        assert len(simulated.ended) == len(trace) and not live.runtime._requests
