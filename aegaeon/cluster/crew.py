"""The members of a cluster as their controller knows them: actors made, looked at and ended.

One thread calls all verbs; none waits for a member longer than LOOK_S.
"""

import logging
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from aegaeon.cluster.link import NAMESPACE
from aegaeon.cluster.member import Member, MemberLaunch, MemberLook
from aegaeon.cluster.plan import MemberPlan
from aegaeon.keeper import KvSizes
from aegaeon.nodes import MemberKind, MemberNow, MemberState
from aegaeon.specs import Catalog

log = logging.getLogger(__name__)

LOOK_S = 0.2  # for all that are looked at together
AGAIN_S = 30.0  # before one that could not start is tried again
SILENT_S = 2.0  # without an answer
GRACE_S = 15.0  # beyond drain_s, for one that drains to end
LOST_S = 10.0  # an actor that Ray holds to be dead, before another one is made
AWAY_S = 1.0  # without an answer from an actor, as its machine tells, before it is held to be gone
NAME_S = 1.0  # for Ray to give a name free
NAME = re.compile(r"instance-[0-9a-f]{8}-[0-9]+|proxy-[0-9]+")


@dataclass(slots=True)
class _Member:
    """An actor. `plan` None: one that nobody wants, found by its name."""

    name: str
    handle: Any
    plan: MemberPlan | None
    asked: Any = None  # the look under way
    asked_s: float = 0.0  # since when
    look: MemberLook | None = None
    state: MemberState = "pending"
    detail: str = ""
    failed_s: float | None = None
    dead_s: float | None = None
    drained_s: float | None = None
    incarnation: int = 0  # of its child, as last told
    restarts: int = 0  # of its actors before this one, and of their children
    away_s: float | None = None  # since when its actor does not answer, if so
    is_seen_to: bool = True  # whether nothing is left of its last life, or it still lives


class Crew:
    """The members of `domain`. `on_end` is told of lives that have ended and nobody else sees to:
    a member's name, and the incarnation of its child."""

    def __init__(
        self, ray: Any, domain: str, drain_s: float, on_end: Callable[[str, int], None]
    ) -> None:
        self._ray = ray
        self._prefix = f"aegaeon-{domain}-"
        self._drain_s = drain_s
        self._on_end = on_end
        self._members: dict[str, _Member] = {}
        self._ended_s: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._members)

    def adopt(self) -> None:
        """Find those that live already: an earlier controller made them."""
        for found in self._ray.util.list_named_actors(all_namespaces=True):
            name = found["name"].removeprefix(self._prefix)
            if found["namespace"] == NAMESPACE and name != found["name"] and NAME.fullmatch(name):
                handle = self._ray.get_actor(found["name"], namespace=NAMESPACE)
                self._members[name] = _Member(name, handle, None)
                log.info("member found name=%s", name)

    def settle(self, plans: dict[str, MemberPlan], nodes: set[str], told: "Told") -> None:
        """Make those of `plans` that are not there, and drain those that are not among them; forget
        those whose nodes are not among `nodes` any more."""
        now = time.monotonic()
        for name, member in tuple(self._members.items()):
            plan = plans.get(name)
            if member.plan is None and plan is not None:
                member.plan = plan
            node = member.plan.node if member.plan is not None else None
            if node is not None and node not in nodes:
                log.warning("node lost name=%s node=%s", name, node)
                self._end(member)
            elif plan is None or plan.node != node:
                self._drain(member, now)
            elif _is_since(member.failed_s, AGAIN_S, now) or _is_since(member.dead_s, LOST_S, now):
                self._end(member)
            elif _is_since(member.away_s, AWAY_S, now) and not member.is_seen_to:
                # Its child has died with it, or is cut off: its requests go on elsewhere now.
                self._see_to(member)
        for name, plan in plans.items():
            if name not in self._members and now >= self._ended_s.get(name, 0.0) + NAME_S:
                self._make(plan, told)

    def look(self) -> None:
        """Ask all how they are, and take in what has been answered."""
        for member in self._members.values():
            if member.asked is None:
                member.asked, member.asked_s = member.handle.look.remote(), time.monotonic()
        asked = {member.asked: member for member in self._members.values()}
        if not asked:
            return
        answered, _ = self._ray.wait(list(asked), num_returns=len(asked), timeout=LOOK_S)
        for one in answered:
            member = asked[one]
            member.asked = None
            self._take(member, one)

    def kill(self, names: Iterable[str] | None = None) -> None:
        """End these members, or all, at once."""
        for name in tuple(self._members if names is None else names):
            self._end(self._members[name])

    def of_kind(self, kind: MemberKind) -> tuple[str, ...]:
        """Return the names of those of a kind."""
        return tuple(name for name in self._members if name.startswith(kind))

    def silent(self) -> set[str]:
        """Return the names of those that have been asked for a while and have not answered."""
        asked = [member for member in self._members.values() if member.asked is not None]
        return {one.name for one in asked if time.monotonic() - one.asked_s >= SILENT_S}

    def places(self) -> dict[str, str]:
        """Return the nodes of members, by name."""
        plans = (member.plan for member in self._members.values())
        return {plan.name: plan.node for plan in plans if plan is not None}

    def now(self) -> tuple[MemberNow, ...]:
        """Return what is known of them, by name."""
        return tuple(_now(self._members[name]) for name in sorted(self._members))

    def _make(self, plan: MemberPlan, told: "Told") -> None:
        ray = self._ray
        launch = MemberLaunch(
            plan=plan,
            address=told.addresses[plan.node],
            catalog=told.catalog,
            kv_spare=told.kv_spare,
            secret=told.secret,
        )
        affinity = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        options: dict[str, Any] = {
            "name": self._prefix + plan.name,
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "get_if_exists": True,
            "max_restarts": -1,
            "num_cpus": plan.cpus,
            "num_gpus": plan.gpus,
            "resources": plan.resources,
            "scheduling_strategy": affinity(plan.node, soft=False),
        }
        if plan.memory_bytes:
            options["memory"] = plan.memory_bytes
        actor = ray.remote(Member).options(**options)
        handle = actor.remote(msgspec.json.encode(launch))
        self._members[plan.name] = _Member(plan.name, handle, plan)
        log.info("member made name=%s node=%s", plan.name, plan.node)

    def _drain(self, member: _Member, now: float) -> None:
        if member.drained_s is None:
            member.drained_s = now
            log.info("member drains name=%s", member.name)
            member.handle.drain.remote()
        is_over = member.state in ("ended", "failed", "pending")
        if is_over or now - member.drained_s >= self._drain_s + GRACE_S:
            self._end(member)

    def _end(self, member: _Member) -> None:
        del self._members[member.name]
        self._ended_s[member.name] = time.monotonic()
        self._ray.kill(member.handle, no_restart=True)
        if member.state != "ended":
            self._see_to(member)
        log.info("member ended name=%s state=%s", member.name, member.state)

    def _take(self, member: _Member, answer: Any) -> None:
        """Take in how a member is, or that it did not answer."""
        errors = self._ray.exceptions
        try:
            look = msgspec.json.decode(self._ray.get(answer), type=MemberLook)
        except errors.ActorUnavailableError:
            self._is_away(member, "its actor is being started again")
        except errors.RayError as error:
            if member.dead_s is None:
                member.dead_s = time.monotonic()
                log.warning("member does not answer name=%s error=%s", member.name, error)
            self._is_away(member, str(error).splitlines()[0])
        else:
            self._note_life(member, look)
            member.look, member.state, member.detail = look, look.state, look.detail
            if look.state == "failed" and member.failed_s is None:
                member.failed_s = time.monotonic()
                log.error("member failed name=%s reason=%s", member.name, look.detail)

    def _is_away(self, member: _Member, detail: str) -> None:
        member.state, member.detail = "restarting", detail
        if member.away_s is None:
            member.away_s = time.monotonic()
            member.is_seen_to = False

    def _see_to(self, member: _Member) -> None:
        member.is_seen_to = True
        if member.incarnation:
            self._on_end(member.name, member.incarnation)

    def _note_life(self, member: _Member, look: MemberLook) -> None:
        before = member.incarnation
        if look.incarnation != before:
            member.incarnation = look.incarnation
            if before and member.away_s is not None:
                # Its supervisor sees to the ends of its own children, but not to those of the last.
                if not member.is_seen_to:
                    self._on_end(member.name, before)
                member.restarts += 1 + (member.look.restarts if member.look is not None else 0)
        member.away_s = member.dead_s = None


@dataclass(frozen=True, slots=True)
class Told:
    """What members that are made now are told."""

    addresses: dict[str, str]  # of nodes, by id
    catalog: Catalog
    kv_spare: tuple[KvSizes, ...] = ()
    secret: bytes = b""

    def __repr__(self) -> str:
        """Return it without the secret."""
        return f"Told(addresses={self.addresses!r})"


def _now(member: _Member) -> MemberNow:
    plan, look = member.plan, member.look
    kind: MemberKind = "proxy" if member.name.startswith("proxy") else "instance"
    state = "draining" if member.drained_s is not None else member.state
    return MemberNow(
        name=member.name,
        kind=kind,
        node=plan.node if plan is not None else "",
        state=state,
        restarts=member.restarts + (look.restarts if look is not None else 0),
        url=look.url if look is not None else "",
        detail=member.detail,
    )


def _is_since(begun_s: float | None, limit_s: float, now: float) -> bool:
    return begun_s is not None and now - begun_s >= limit_s
