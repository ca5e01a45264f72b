"""The controller of a cluster, as an actor: it has nodes get what they are to have.

Imports no ray; whoever starts it makes an actor of the class (serve.py). Verbs do not wait; one
thread owns all the rest, from the start to the end.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from aegaeon.cluster.crew import Crew, Told
from aegaeon.cluster.link import nodes_of, ray_module
from aegaeon.cluster.lives import end_life, end_mailbox
from aegaeon.cluster.placing import Placing, Seen
from aegaeon.cluster.plan import MemberPlan, plan_members, staying
from aegaeon.config import Settings
from aegaeon.errors import AegaeonError, ConfigError, StoreUnavailable
from aegaeon.figures import encode_figures
from aegaeon.instance.launch import mailbox_address
from aegaeon.instance.presence import RENEWALS_PER_LEASE
from aegaeon.keeper import CatalogKeeper, KvSizes, bounds_of
from aegaeon.logs import set_up
from aegaeon.nodes import CLUSTER, ClusterFigures, MemberNow, NodeNow
from aegaeon.specs import Catalog
from aegaeon.store.base import Board, Domain
from aegaeon.store.domains import JOIN_S, join_domain
from aegaeon.store.redis_url import without_password
from aegaeon.types import Instance, ModelSpec

log = logging.getLogger(__name__)

TURN_S = 0.5
TELL_S = 1.0
LATE_S = 1.0  # for a renewal of a lease, on a busy machine


class ControllerLaunch(msgspec.Struct, frozen=True, kw_only=True):
    """What a controller is told; the first proxy goes to the node `first`. `kv_spare` is what keys
    and values are like of models that may be added, `secret` what porters prove to know."""

    settings: Settings
    specs: tuple[ModelSpec, ...]
    first: str
    kv_spare: tuple[KvSizes, ...] = ()
    secret: bytes = b""

    def __repr__(self) -> str:
        """Return it without the secret."""
        return f"ControllerLaunch(first={self.first!r})"


class ControllerLook(msgspec.Struct, frozen=True, kw_only=True):
    """What a controller says of itself and its cluster."""

    is_ready: bool
    has_ended: bool
    failure: str
    nodes: tuple[NodeNow, ...]
    members: tuple[MemberNow, ...]


class Controller:
    """Its end changes nothing for its members; started again, it finds them."""

    def __init__(self, told: bytes) -> None:
        """Start, told by a ControllerLaunch; what keeps it from that is told by `look`."""
        self._launch = launch = msgspec.json.decode(told, type=ControllerLaunch)
        set_up(launch.settings.log_level, "controller", launch.settings.log_format)
        self._ray = ray_module()
        context = self._ray.get_runtime_context()
        self._is_first = not context.was_current_actor_reconstructed
        self._nodes: tuple[NodeNow, ...] = ()
        self._members: tuple[MemberNow, ...] = ()
        self._failure = ""
        self._should_stop = False
        self._should_kill = False
        self._has_ended = False
        self._thread = threading.Thread(target=self._own, name="controller")
        self._thread.start()

    def launch(self) -> bytes:
        """Return what it was told."""
        return msgspec.json.encode(self._launch)

    def look(self) -> bytes:
        """Return a ControllerLook."""
        ready = {member.kind for member in self._members if member.state == "ready"}
        return msgspec.json.encode(
            ControllerLook(
                is_ready=ready == {"instance", "proxy"},
                has_ended=self._has_ended,
                failure=self._failure,
                nodes=self._nodes,
                members=self._members,
            )
        )

    def ask_stop(self, at_once: bool = False) -> None:
        """Begin to drain all, or to kill them. Idempotent."""
        self._should_stop = True
        self._should_kill = self._should_kill or at_once

    # The owning thread

    def _own(self) -> None:
        settings = self._launch.settings
        try:
            domain = join_domain(settings)
            try:
                self._serve(domain)
                domain.unlink()
            finally:
                domain.close()
        except AegaeonError as error:
            log.error("cannot go on error=%s", error)
            self._failure = str(error)
        except Exception as error:
            log.exception("controller crashed")
            self._failure = f"the controller crashed ({error}); see its log, among those of Ray"
        finally:
            self._has_ended = True

    def _serve(self, domain: Domain) -> None:
        settings, crew = self._launch.settings, self._crew(domain)
        crew.adopt()
        if self._is_first and not len(crew):
            _begin_empty(domain, settings, lambda: self._should_stop)
        first = Catalog(models=self._launch.specs, bounds=bounds_of(settings))
        board = domain.board()
        # Where members live already, so do models, and their rows say where.
        patience_s = settings.lease_s if len(crew) else 0.0
        placing = Placing(settings, time.monotonic() + patience_s)
        kept = _Kept(domain, board, _keeper(domain, board, first), placing)
        try:
            beats, tell_s = 0, 0.0
            while not self._is_over(crew):
                began_s = time.monotonic()
                self._turn(kept, crew)
                if began_s >= tell_s:
                    beats, tell_s = beats + 1, began_s + TELL_S
                    self._tell(kept, beats)
                time.sleep(max(0.0, began_s + TURN_S - time.monotonic()))
        finally:
            board.close()

    def _is_over(self, crew: Crew) -> bool:
        if self._should_kill:
            crew.kill()
        return self._should_stop and not len(crew)

    def _turn(self, kept: "_Kept", crew: Crew) -> None:
        settings, keeper, rows = self._launch.settings, kept.keeper, _rows(kept.domain)
        self._nodes = nodes_of(self._ray)
        crew.look()
        plans = plan_members(settings, self._nodes, self._launch.first, crew.places())
        if not self._should_stop:
            self._place(kept, crew, plans, rows)
        catalog = keeper.current()
        held = kept.placing.held(catalog, self._nodes, time.monotonic())
        plans |= staying(settings, held, crew.places())
        if self._should_stop:
            # Proxies first: their streams end at instances that live.
            has_proxies = bool(crew.of_kind("proxy"))
            plans = {
                name: plan
                for name, plan in plans.items()
                if has_proxies and plan.kind == "instance" and name in crew.places()
            }
        ids = {node.id for node in self._nodes}
        addresses = {node.id: node.address for node in self._nodes}
        told = Told(addresses, catalog, self._launch.kv_spare, self._launch.secret)
        crew.settle(plans, ids, told)
        for row in rows:
            if is_lost(row, ids, crew.silent(), settings.lease_s):
                log.warning("instance lost name=%s node=%s", row.record.id, row.record.node)
                end_life(kept.domain, row.record)
        keeper.tend(time.monotonic())
        self._members = crew.now()

    def _place(
        self, kept: "_Kept", crew: Crew, plans: dict[str, MemberPlan], rows: tuple[Instance, ...]
    ) -> None:
        """Have models live where they should, before members are told of them."""
        placing, now = kept.placing, time.monotonic()
        seen = Seen.of(self._nodes, plans.values(), rows, crew.silent(), crew.now())
        try:
            catalog = kept.keeper.current()
            if placing.wants_figures(now):
                placing.demands.note(kept.board.read(), now)
            placement = placing.look(catalog, seen, now)
            if placement is not None:
                kept.keeper.place(placement, rows)
        except AegaeonError as error:
            placing.again()
            log.warning("models not placed error=%s", error)

    def _crew(self, domain: Domain) -> Crew:
        settings = self._launch.settings

        def end(name: str, incarnation: int) -> None:
            address = mailbox_address(name, incarnation)
            rows = [row.record for row in _rows(domain) if row.record.mailbox == address]
            for record in rows:
                end_life(domain, record)
            if not rows:
                end_mailbox(domain, address)

        return Crew(self._ray, settings.domain_name, settings.drain_s, end)

    def _tell(self, kept: "_Kept", beats: int) -> None:
        figures = ClusterFigures(
            beats=beats, nodes=self._nodes, members=self._members, levels=kept.placing.levels
        )
        try:
            kept.board.publish(CLUSTER, encode_figures(figures))
        except AegaeonError as error:
            log.warning("cluster not told of error=%s", error)


@dataclass(frozen=True, slots=True)
class _Kept:
    """What the owning thread keeps in order, and where."""

    domain: Domain
    board: Board
    keeper: CatalogKeeper
    placing: Placing


def _keeper(domain: Domain, board: Board, first: Catalog) -> CatalogKeeper:
    """Return what keeps the catalogue: that which is there, else `first`. A store that is silent
    just now is waited for. Raises StoreUnavailable, RegionError."""
    give_up_s = time.monotonic() + JOIN_S
    while True:
        try:
            known = domain.catalog().read()
            begin = known if known.version else first
            return CatalogKeeper(domain.catalog(), domain.metadata(), board, begin)
        except StoreUnavailable as error:
            if time.monotonic() >= give_up_s:
                raise
            log.warning("catalogue not readable yet error=%s", error)
            time.sleep(TURN_S)


def _begin_empty(domain: Domain, settings: Settings, should_stop: Callable[[], bool]) -> None:
    """Remove what an earlier server of this domain left, once it is dead. Raises ConfigError where
    one lives, StoreUnavailable."""
    give_up_s = time.monotonic() + settings.lease_s + 1.0
    while rows := domain.metadata().sync_for_routing():
        if time.monotonic() >= give_up_s or should_stop():
            names = ", ".join(row.record.id for row in rows)
            raise ConfigError(
                f"domain {settings.domain_name} of {without_password(settings.redis_url)} belongs "
                f"to a running server ({names}); stop it, or choose another --domain"
            )
        time.sleep(TURN_S)
    domain.unlink()


def _rows(domain: Domain) -> tuple[Instance, ...]:
    try:
        return domain.metadata().sync_for_routing()
    except AegaeonError as error:
        log.warning("table not readable error=%s", error)
        return ()


def is_lost(row: Instance, nodes: set[str], silent: set[str], lease_s: float) -> bool:
    """Whether an instance is gone, before its lease has ended: its node is not among `nodes`, or
    its member is `silent`, and it has not renewed its lease when it should have."""
    if row.record.node not in nodes:
        return True
    if row.record.id not in silent or row.lease_left_s is None:
        return False
    return lease_s - row.lease_left_s >= lease_s / RENEWALS_PER_LEASE + LATE_S
