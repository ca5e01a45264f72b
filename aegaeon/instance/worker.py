"""The process of one instance: `python -m aegaeon.instance.worker`, told by JSON on stdin.

Builds engine, scheduler and runtime, and maps signals and errors to drains and exit codes.
"""

import dataclasses
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType

import msgspec

from aegaeon import _native
from aegaeon.engine.base import Engine
from aegaeon.engine.open import open_engine
from aegaeon.engine.regions import Regions
from aegaeon.errors import AegaeonError, DeviceLost, StaleIncarnation
from aegaeon.instance.at_work import AtWork
from aegaeon.instance.costs import costs_of, paced
from aegaeon.instance.counts import Counts
from aegaeon.instance.kv_share import KvShare
from aegaeon.instance.lanes import ThreadLane
from aegaeon.instance.launch import (
    EXIT_CANNOT_START,
    EXIT_CRASHED,
    EXIT_DEVICE_LOST,
    EXIT_DRAINED,
    EXIT_REPLACED,
    Launch,
    mailbox_address,
    memory_name,
    neighbours_path,
)
from aegaeon.instance.load_slots import LoadSlots
from aegaeon.instance.outbox import Outbox
from aegaeon.instance.presence import Presence
from aegaeon.instance.pulls import Pulls
from aegaeon.instance.runtime import Parts, Runtime
from aegaeon.instance.served import Deciding, Served, settle_model
from aegaeon.instance.stalls import Stalls
from aegaeon.instance.watchdog import Watchdog
from aegaeon.instance.ways import Ways
from aegaeon.logs import set_up
from aegaeon.metrics import Target
from aegaeon.models.here import Here
from aegaeon.scheduler.dispatch import LiveDispatcher
from aegaeon.scheduler.learning import LearningCosts
from aegaeon.scheduler.ledger import Limits
from aegaeon.scheduler.policies import POLICIES, AnyScheduler, Fleet
from aegaeon.scheduler.residency import Residency
from aegaeon.store.base import Domain, Mailbox
from aegaeon.store.catalog import CatalogView
from aegaeon.store.catalog_here import CatalogHere
from aegaeon.store.domains import join_domain
from aegaeon.store.names import KV, SHARED_MEMORY, WEIGHTS, region_path
from aegaeon.types import ComputeAction, InstanceRecord, Load, Outcome

log = logging.getLogger(__name__)

LANE_CLOSE_S = 5.0

_Exit = Callable[
    [type[BaseException] | None, BaseException | None, TracebackType | None], bool | None
]


def regions_of(launch: Launch) -> Regions:
    """Return where the node's processes share weights and KV, and the processors where the
    settings do not share them out; removed with the domain."""
    settings, node = launch.settings, launch.node
    weights, kv = (
        str(region_path(SHARED_MEMORY, memory_name(settings.domain_name, node), kind))
        for kind in (WEIGHTS, KV)
    )
    neighbours = neighbours_path(settings, node)
    return Regions(weights, kv, launch.kv_shapes, launch.kv_spare, neighbours, launch.index)


def build_scheduler(launch: Launch, residency: Residency, learning: LearningCosts) -> AnyScheduler:
    """Return the scheduler that the settings ask for. Raises BudgetTooSmall."""
    settings, specs = launch.settings, launch.specs
    limits = Limits(
        max_batch=settings.max_batch,
        max_waiting=settings.max_waiting,
        max_running=settings.running,
    )
    role = settings.role_of(launch.index)
    fleet = Fleet(target=Target(settings.slo_ttft_s, settings.slo_tbt_s), limits=limits)
    scheduler = POLICIES[settings.policy].scheduler(residency, learning.costs, fleet, role)
    scheduler.observer = learning
    for spec in specs:
        settle_model(scheduler, residency, spec, settings)
    if settings.preload_models:
        # Each instance begins elsewhere, so that together they hold more of the models; those that
        # decode begin as those that prefill for them.
        index = launch.index - (settings.prefilling_count if role == "decode" else 0)
        count = settings.preload_per_instance or len(specs)
        first = index * (settings.preload_per_instance or 1) % max(1, len(specs))
        scheduler.preload(spec.id for spec in (specs[first:] + specs[:first])[:count])
    return scheduler


def build_deciding(launch: Launch, budget_bytes: int) -> Deciding:
    """Return what decides at an instance whose weights may take so much. Raises ConfigError,
    BudgetTooSmall."""
    learning = LearningCosts(*costs_of(launch.settings, launch.specs, budget_bytes))
    residency = Residency({spec.id: spec.weight_bytes for spec in launch.specs}, budget_bytes)
    return Deciding(build_scheduler(launch, residency, learning), residency, learning)


def build_runtime(
    launch: Launch, domain: Domain, engine: Engine, inbox: Mailbox, owned: ExitStack
) -> Runtime:
    """Assemble an instance and register it; `owned` closes what it opens. Raises ConfigError."""
    settings = launch.settings
    deciding = build_deciding(launch, engine.usage().weight_budget_bytes)
    record = _record_of(launch)
    outbox = Outbox(domain.open_mailbox)
    owned.callback(outbox.close)
    compute = ThreadLane[ComputeAction]("compute", engine.execute, inbox.wake)
    owned.callback(compute.close, LANE_CLOSE_S)
    copy = ThreadLane[Load]("copy", _load_of(launch, engine, deciding.residency), inbox.wake)
    owned.callback(copy.close, LANE_CLOSE_S)
    presence = _presence(domain, record, settings.lease_s, owned)
    parts = Parts(
        inbox=inbox,
        outbox=outbox,
        presence=presence,
        engine=engine,
        scheduler=deciding.scheduler,
        ways=_ways(launch, engine, inbox, owned),
        compute=compute,
        copy=copy,
        clock=time.monotonic,
        pause=time.sleep,
        pace=deciding.learning.pace,
        served=Served(launch, _catalog_of(launch, domain), engine, presence, deciding),
        counts=_counts(domain, launch, deciding.learning, owned),
        stalls=Stalls(settings.watchdog_s),
        watchdog=Watchdog(settings.watchdog_s),
        at_work=AtWork(launch.work_fd),
    )
    return Runtime(parts, settings.drain_s)


def _ways(launch: Launch, engine: Engine, inbox: Mailbox, owned: ExitStack) -> Ways:
    """Return how requests go on elsewhere; to other nodes with their KV where there are any."""
    ways = Ways(LiveDispatcher(POLICIES[launch.settings.policy].dispatcher()), engine)
    if not launch.node or engine.exchange is None:
        return ways
    share = KvShare(launch.address, ways.links)
    owned.callback(share.close)
    pulls = Pulls(engine.exchange, inbox.wake)
    owned.callback(pulls.close)
    return dataclasses.replace(ways, share=share, pulls=pulls)


def _catalog_of(launch: Launch, domain: Domain) -> CatalogView:
    """Return the catalogue; on a node of a cluster, of it what has its files there."""
    settings = launch.settings
    if not launch.node or settings.device == "null":  # which needs none
        return domain.catalog()
    return CatalogHere(domain.catalog(), Here(settings.models_dir, settings.kv_dtype), launch.node)


def _record_of(launch: Launch) -> InstanceRecord:
    return InstanceRecord(
        id=launch.instance,
        incarnation=launch.incarnation,
        role=launch.settings.role_of(launch.index),
        device=launch.settings.device,
        mailbox=mailbox_address(launch.instance, launch.incarnation),
        pid=os.getpid(),
        models=tuple(spec.id for spec in launch.specs),
        node=launch.node,
    )


def _load_of(launch: Launch, engine: Engine, residency: Residency) -> Callable[[Load], Outcome]:
    """Return what the copy lane does, within the node's bound on loads."""
    count = launch.settings.max_loading
    if not count:
        return engine.load
    name = memory_name(launch.settings.domain_name, launch.node)
    slots = LoadSlots(SHARED_MEMORY, name, count)
    return slots.bounded(engine.load, residency.is_resident)


def _presence(domain: Domain, record: InstanceRecord, lease_s: float, owned: ExitStack) -> Presence:
    """Register the instance, until `owned` ends."""
    presence = Presence(domain.metadata(), record, lease_s, time.monotonic)
    owned.push(_unless_crashed(presence.withdraw))
    return presence


def _unless_crashed(end: Callable[[], None]) -> _Exit:
    """Return what does that at the end of a stack, but not where a crash ends us: then our
    supervisor does, which says first what we were doing."""

    def leave(kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, StaleIncarnation):
            end()

    return leave


def _counts(domain: Domain, launch: Launch, learning: LearningCosts, owned: ExitStack) -> Counts:
    """Return counts that go on from where the last process of this name ended."""
    board, name = domain.board(), launch.instance
    owned.callback(board.close)
    before = board.read().get(name)
    return Counts(
        lambda record: board.publish(name, record),
        before,
        launch.was_hung,
        learning.costs.models if launch.node else None,
        round(launch.settings.model_cache_budget_gb * 1e9),
    )


def serve(launch: Launch) -> int:
    """Run the instance until it is drained; return the exit code."""
    with ExitStack() as owned:
        try:
            domain = join_domain(launch.settings, holds_lease=True)
            owned.callback(domain.close)
            engine = open_engine(launch.settings, launch.specs, regions_of(launch))
            owned.callback(engine.close)
            paced(engine, launch.settings, launch.specs)
            inbox = domain.create_mailbox(mailbox_address(launch.instance, launch.incarnation))
            owned.push(_unless_crashed(inbox.unlink))
            owned.push(_unless_crashed(inbox.close))
            runtime = build_runtime(launch, domain, engine, inbox, owned)
        except AegaeonError as error:
            log.debug("cannot start error=%s", error)  # the supervisor tells the user
            with open(launch.status_fd, "w", encoding="utf-8") as status:  # noqa: PTH123  a descriptor
                status.write(str(error))
            return EXIT_CANNOT_START

        def drain(*_: object) -> None:
            runtime.drain()
            inbox.wake()

        signal.signal(signal.SIGTERM, drain)
        os.close(launch.status_fd)
        log.info("instance up incarnation=%d pid=%d", launch.incarnation, os.getpid())
        runtime.run()
        log.info("instance drained")
    return EXIT_DRAINED


def main() -> int:
    """Read the launch record, serve, and return the process's exit code."""
    launch = msgspec.json.decode(sys.stdin.buffer.read(), type=Launch)
    _native.die_with_parent(signal.SIGKILL, launch.parent_pid)
    set_up(launch.settings.log_level, launch.instance, launch.settings.log_format)
    try:
        return serve(launch)
    except StaleIncarnation as error:
        log.error("replaced error=%s", error)
        return EXIT_REPLACED
    except DeviceLost as error:
        log.critical(
            "%s is lost, so this instance ends: its requests go on elsewhere, and it is started "
            "again error=%s",
            *(launch.settings.device, error),
        )
        return EXIT_DEVICE_LOST
    except Exception:
        log.exception("instance crashed")
        return EXIT_CRASHED


if __name__ == "__main__":
    sys.exit(main())
