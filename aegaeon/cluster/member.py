"""A member of a cluster, as an actor: a supervisor of one instance or one proxy on its node.

Imports no ray; the controller makes an actor of the class. Verbs take and return bytes, or
nothing, and none of them waits.
"""

import logging
import threading
from collections.abc import Sequence
from typing import IO

import msgspec

from aegaeon.child import Child
from aegaeon.cluster.janitor import watch
from aegaeon.cluster.lives import end_life
from aegaeon.cluster.plan import MemberPlan
from aegaeon.cluster.porters import PorterPost
from aegaeon.config import Settings
from aegaeon.errors import AegaeonError
from aegaeon.holding import Holding, Keeper, Layout, lay_out_node
from aegaeon.instance.launch import memory_name
from aegaeon.keeper import KvSizes
from aegaeon.logs import set_up
from aegaeon.memory.machine import Machine, read_machine, with_device
from aegaeon.models.here import Here
from aegaeon.nodes import MemberState
from aegaeon.ports import free_port
from aegaeon.specs import Catalog
from aegaeon.store.base import Domain
from aegaeon.store.catalog import CatalogStore
from aegaeon.store.catalog_here import catalog_here
from aegaeon.store.domains import join_domain
from aegaeon.store.shares import Share, share_memory
from aegaeon.supervisor import Supervisor
from aegaeon.types import ModelSpec

log = logging.getLogger(__name__)


class MemberLaunch(msgspec.Struct, frozen=True, kw_only=True):
    """What a member is told. `catalog` are the models as the controller knew them last, and
    `kv_spare` what keys and values are like of those that may be added; `secret` is what the
    porters of the cluster prove to each other that they know."""

    plan: MemberPlan
    address: str  # of the node
    catalog: Catalog
    kv_spare: tuple[KvSizes, ...] = ()
    secret: bytes = b""

    def __repr__(self) -> str:
        """Return it without the secret."""
        return f"MemberLaunch(plan={self.plan.name!r})"


class MemberLook(msgspec.Struct, frozen=True, kw_only=True):
    """What a member says of itself. `incarnation` is its child's, which with the member's name
    names its mailbox; a proxy listens at `url`."""

    state: MemberState
    incarnation: int
    restarts: int
    url: str = ""
    detail: str = ""


class Member:
    """Whoever ends it ends its child: the kernel does, where nobody else can."""

    def __init__(self, told: bytes) -> None:
        """Start, told by a MemberLaunch; what keeps it from starting is told by `look`."""
        launch = msgspec.json.decode(told, type=MemberLaunch)
        self._plan = plan = launch.plan
        self._settings = settings = _on_node(plan)
        set_up(settings.log_level, plan.name, settings.log_format)
        self._address = launch.address
        self._failure = ""
        self._ending: threading.Thread | None = None
        self._supervisor: Supervisor | None = None
        here = Here(settings.models_dir, settings.kv_dtype)
        specs = tuple(here.local(spec) for spec in launch.catalog.models)
        holding = NodeShare(launch)
        self._post = PorterPost(settings, plan.node, launch.address, launch.secret)
        supervisor = Supervisor(settings, specs, plan.kind == "proxy", holding)
        try:
            _end_last_life(settings, plan.name)
            supervisor.start()
        except AegaeonError as error:
            log.error("cannot start name=%s error=%s", plan.name, error)
            self._failure = str(error)
        else:
            self._supervisor = supervisor
            self._post.start()

    def look(self) -> bytes:
        """Return a MemberLook."""
        supervisor = self._supervisor
        child = supervisor.children[0] if supervisor is not None else Child("", None)
        return msgspec.json.encode(
            MemberLook(
                state=self._state(),
                incarnation=child.incarnation,
                restarts=max(0, child.starts - 1),
                url=self._url(),
                detail=self._why(),
            )
        )

    def drain(self) -> None:
        """Begin to take nothing new, to let end what is open, and to end. Idempotent."""
        supervisor = self._supervisor
        if supervisor is not None and self._ending is None:
            self._ending = threading.Thread(target=self._end, args=(supervisor,), name="drain")
            self._ending.start()

    def _end(self, supervisor: Supervisor) -> None:
        supervisor.stop()
        self._post.close()

    def _state(self) -> MemberState:
        supervisor = self._supervisor
        if self._why():
            return "failed"
        if supervisor is None:
            return "ended"
        if self._ending is not None:
            return "draining" if self._ending.is_alive() else "ended"
        if supervisor.children[0].process is None and supervisor.is_ready:
            return "restarting"
        return "ready" if supervisor.is_ready else "starting"

    def _why(self) -> str:
        supervisor = self._supervisor
        if supervisor is not None and supervisor.failure is not None:
            return str(supervisor.failure)
        return self._failure

    def _url(self) -> str:
        if self._plan.kind != "proxy":
            return ""
        host = self._settings.host
        return f"http://{self._address if host in ('0.0.0.0', '::', '') else host}:" + str(
            self._settings.port
        )


class NodeShare(Holding):
    """An instance's share of its node's memory; a proxy has none."""

    def __init__(self, launch: MemberLaunch) -> None:
        """Nothing is taken yet."""
        plan = launch.plan
        self.node, self.proxy, self.address = plan.node, plan.name, launch.address
        self._kv_spare = launch.kv_spare
        self._plan = plan
        self._catalog = launch.catalog
        self._share: Share | None = None
        self._janitor: IO[bytes] | None = None

    def instances(self, settings: Settings) -> list[Child]:  # noqa: ARG002  one of the node's
        """See Holding."""
        plan = self._plan
        return [Child(plan.name, plan.index)] if plan.kind == "instance" else []

    def take(self, settings: Settings, specs: Sequence[ModelSpec]) -> Layout:
        """See Holding. The first on the node lays its memory out, the others go by that."""
        if self._plan.kind == "proxy":
            return Layout(settings)

        def make() -> bytes:
            able = [spec for spec in specs if self._plan.may_have(spec)]
            layout = lay_out_node(settings, able, self._machine(settings))
            spare = tuple(sorted({*layout.kv_spare, *self._kv_spare}))
            return msgspec.json.encode(msgspec.structs.replace(layout, kv_spare=spare))

        name = memory_name(settings.domain_name, self.node)
        self._share = share_memory(name, make)
        try:
            self._janitor = watch(name)
        except OSError as error:
            log.warning("no janitor, memory of the dead may stay error=%s", error)
        return msgspec.json.decode(self._share.layout, type=Layout)

    def keeper(self, domain: Domain, settings: Settings, _: tuple[ModelSpec, ...]) -> Keeper:
        """See Holding. The controller keeps the catalogue."""
        here = None
        if self._plan.kind == "instance" and settings.device != "null":  # which needs no files
            here = Here(settings.models_dir, settings.kv_dtype)
        return CatalogReader(domain.catalog(), self._catalog, here, self.node)

    def release(self) -> None:
        """See Holding."""
        if self._share is not None:
            self._share.release()
        if self._janitor is not None:
            self._janitor.close()

    def _machine(self, settings: Settings) -> Machine:
        """What the node's instances may share out: what they take of it by their rule, if it says,
        and the memory of the GPUs, of which each has one or a part of one."""
        machine, plan = with_device(read_machine(), settings), self._plan
        if plan.memory_bytes:
            bound_bytes = settings.instance_count * plan.memory_bytes
            bound_bytes = min(machine.memory_bytes, bound_bytes)
            machine = msgspec.structs.replace(machine, memory_bytes=bound_bytes)
        devices = settings.instance_count / plan.gpus_shared_by
        return msgspec.structs.replace(machine, device_bytes=int(machine.device_bytes * devices))


class CatalogReader:
    """The catalogue as a member sees it, which never changes it: for an instance as its `node` has
    it `here`."""

    def __init__(
        self, store: CatalogStore, known: Catalog, here: Here | None = None, node: str = ""
    ) -> None:
        self._store = store
        self._known = known
        self._here = here
        self._node = node

    def current(self) -> Catalog:
        """Return it; as last seen while the store does not answer, or has forgotten it."""
        try:
            found = self._store.read()
        except AegaeonError as error:
            log.warning("catalogue not readable error=%s", error)
        else:
            self._known = found if found.version >= self._known.version else self._known
        if self._here is None:
            return self._known
        return catalog_here(self._known, self._here, self._node)

    def tend(self, now: float) -> None:
        """Nothing is to be done."""


def _on_node(plan: MemberPlan) -> Settings:
    """The settings with what only the node can choose."""
    settings = plan.settings
    if plan.kind == "proxy" and settings.port == 0:
        return msgspec.structs.replace(settings, port=free_port(settings.host))
    return settings


def _end_last_life(settings: Settings, name: str) -> None:
    """Take out what an earlier actor of this name has left, which died without a word: its requests
    go on elsewhere now. Raises StoreUnavailable."""
    domain = join_domain(settings)
    try:
        for row in domain.metadata().sync_for_routing():
            if row.record.id == name:
                end_life(domain, row.record)
    finally:
        domain.close()
