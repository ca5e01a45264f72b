"""The placement of a cluster's models, kept: chosen anew when nodes or models come or go, and now
and then by load; no node is left before others serve.

Owned by the controller's thread. What is decided stands in the catalogue, which survives us: all
that is kept here is when things were done.
"""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence

import msgspec

from aegaeon.cluster.demands import Demands, labelled, with_bounds
from aegaeon.cluster.homes import Homes, abode_of, choose
from aegaeon.cluster.plan import MemberPlan
from aegaeon.cluster.refusals import Refusals
from aegaeon.config import Settings
from aegaeon.measures import Phase
from aegaeon.nodes import ClusterSettings, MemberNow, NodeNow
from aegaeon.placements import Abode, Placement
from aegaeon.scheduler.dispatch import PREFILLING
from aegaeon.scheduler.known_costs import LINK_GB_PER_S
from aegaeon.scheduler.levels import Node, NodeId
from aegaeon.scheduler.placement import Need, Rules
from aegaeon.specs import Catalog
from aegaeon.types import Instance, ModelId

log = logging.getLogger(__name__)

NOTE_S = 5.0  # between two looks at what has come
MEMORY_S = 60.0  # of what came, where nothing else says how long it counts
HOLD_S = 30.0  # for models to be served elsewhere, before a node that is drained takes nothing new
LEAVE_S = 120.0  # for all nodes of a model to serve it, before it leaves another for one that does
CACHE_SHARE = 0.6  # of a node's memory that no instance has laid out yet
UNKNOWN_BYTES = 1 << 60
NOBODY = frozenset[NodeId]()
NO_LINK = 1e15  # of devices that compute where the weights are


class Seen(msgspec.Struct, frozen=True):
    """What there is now: nodes that are to have instances, and how many devices each has; of all
    nodes those that live; the instances; nodes without any of which nobody answers, and those
    where none can start."""

    nodes: dict[NodeId, tuple[NodeNow, int]]
    alive: frozenset[NodeId]
    rows: tuple[Instance, ...]
    silent: frozenset[NodeId] = frozenset()
    failed: frozenset[NodeId] = frozenset()

    @staticmethod
    def of(
        nodes: Sequence[NodeNow],
        plans: Iterable[MemberPlan],
        rows: tuple[Instance, ...],
        silent: Collection[str],
        members: Iterable[MemberNow],
    ) -> "Seen":
        """Return it, of what is planned, of which members are `silent`, and how they are."""
        names: dict[NodeId, list[str]] = {}
        for plan in plans:
            if plan.kind == "instance":
                names.setdefault(plan.node, []).append(plan.name)
        failed = {member.name for member in members if member.state == "failed"}
        there = {row.record.node for row in rows}
        bare = {node: here for node, here in names.items() if node not in there}
        return Seen(
            {node.id: (node, len(names[node.id])) for node in nodes if node.id in names},
            frozenset(node.id for node in nodes),
            rows,
            frozenset(node for node, here in bare.items() if set(here) <= set(silent)),
            frozenset(node for node, here in bare.items() if set(here) <= failed),
        )


class Placing:
    """`look` says what is to be published."""

    def __init__(self, settings: Settings, patient_until_s: float = float("-inf")) -> None:
        """Nothing is known; what was decided before comes with the catalogue, or, where that has
        been forgotten, with all instances' rows, for which is waited until a time."""
        self._patient_until_s = patient_until_s
        cluster = settings.clustered or ClusterSettings()
        self._settings = settings
        self._rules = Rules(least=cluster.replicas, most_moves=cluster.most_moves)
        self._every_s = cluster.rebalance_s
        self.demands = Demands(cluster.rebalance_s or MEMORY_S)
        self._refusals = Refusals()
        self.levels: dict[NodeId, float] = {}  # as last chosen
        self._served: set[NodeId] = set()  # nodes that have had instances
        self._known: set[NodeId] = set()  # those that serve, or had models before they did
        self._asked: object = None  # what was to be placed, and where, the last time
        self._due_s = float("-inf")
        self._note_s = float("-inf")
        self._left_s: dict[ModelId, float] = {}  # since when nodes of a model are being left
        self._drained_s: dict[NodeId, float] = {}  # since when nodes are drained

    def wants_figures(self, now: float) -> bool:
        """Whether it is time for `demands.note`; then it is asked for again in a while."""
        is_due = now >= self._note_s
        if is_due:
            self._note_s = now + min(NOTE_S, (self._every_s or MEMORY_S) / 2)
        return is_due

    def look(self, catalog: Catalog, seen: Seen, now: float) -> Placement | None:
        """Return where the models of `catalog` live now, if that has changed. Without a node that
        may have any all stays as it is."""
        seen = self._able(catalog, seen)
        self._refusals.note(catalog, seen.rows, seen.alive)
        if not seen.nodes:
            return None
        if catalog.placement is None and now < self._patient_until_s:
            told = {row.record.node for row in seen.rows if row.status.state == "ready"}
            if not seen.nodes.keys() <= told:
                return None
        placement = catalog.placement or _found(catalog, seen)
        asked = _asked(catalog, seen), self._refusals.barred
        if asked != self._asked or (self._every_s and now >= self._due_s):
            placement = self._choose(catalog, placement, seen)
            self._asked, self._due_s = asked, now + self._every_s
        placement = self._leave(placement, seen, now)
        behind = any(row.status.catalog > catalog.version for row in seen.rows)
        if placement == catalog.placement and not behind:
            return None
        _tell(catalog.placement, placement)
        return placement

    def held(self, catalog: Catalog, nodes: Iterable[NodeNow], now: float) -> list[NodeNow]:
        """Return those of `nodes` that Ray drains, but that have models which nobody else serves
        yet: their instances go on until then, or for HOLD_S."""
        draining = {node.id: node for node in nodes if node.is_draining}
        self._drained_s = {one: self._drained_s.get(one, now) for one in draining}
        placement = catalog.placement
        abodes = () if placement is None else placement.abodes.values()
        left = {node for abode in abodes for node in (*abode.nodes, *abode.leaving)}
        return [
            node
            for one, node in draining.items()
            if one in left and now - self._drained_s[one] < HOLD_S
        ]

    def again(self) -> None:
        """What was returned last could not be published: choose anew."""
        self._asked = None

    def _able(self, catalog: Catalog, seen: Seen) -> Seen:
        """What there is, without nodes that are lost, and with those alone that may have models:
        one that joins may when it serves, for what would wait for it can be served elsewhere; at
        the start all may."""
        self._served |= {row.record.node for row in seen.rows}
        self._known |= {row.record.node for row in seen.rows if row.status.state == "ready"}
        if catalog.placement is None:
            self._known |= seen.nodes.keys()
        else:
            placed = catalog.placement.abodes.values()
            self._known |= {node for abode in placed for node in abode.nodes}
        # Who is silent but has never served is only being started.
        alive = seen.alive - seen.failed - (seen.silent & self._served)
        self._known &= alive
        able = {node: what for node, what in seen.nodes.items() if node in self._known}
        return msgspec.structs.replace(seen, nodes=able, alive=alive)

    def _choose(self, catalog: Catalog, before: Placement, seen: Seen) -> Placement:
        settings = with_bounds(self._settings, catalog.bounds)
        devices = sum(count for _, count in seen.nodes.values())
        alive = {row.record.id for row in seen.rows}
        needs = self.demands.needs(catalog.models, settings, devices, alive)
        needs = _but_barred(needs, self._refusals.barred)
        if self.demands.is_young:
            needs = [_as_before(need, before) for need in needs]
        nodes = [self._node(node, count, catalog, seen) for node, count in seen.nodes.values()]
        present = {
            model: abode.nodes for model, abode in before.abodes.items() if catalog.find(model)
        }
        homes = choose(nodes, needs, present, self._rules)
        self.levels = homes.levels
        return Placement(rule=homes.rule, abodes=_abodes(homes, before, seen.alive))

    def _node(self, node: NodeNow, devices: int, catalog: Catalog, seen: Seen) -> Node:
        """What a node has, by its instances where they have said it, else by the settings."""
        settings = self._settings
        rows = [row for row in seen.rows if row.record.node == node.id]
        known = [self.demands.instances.get(row.record.id) for row in rows]
        told = [one for one in known if one is not None]
        cache_bytes = max((one.cache_budget_bytes for one in told), default=0)
        cache_bytes = cache_bytes or round(settings.model_cache_budget_gb * 1e9)
        cache_bytes = cache_bytes or round(CACHE_SHARE * node.memory_bytes) or UNKNOWN_BYTES
        budgets = [one.weight_budget_bytes for one in told if one.weight_budget_bytes]
        return Node(
            id=node.id,
            devices=devices,
            cache_bytes=max(0, cache_bytes - _staying_bytes(node.id, rows, catalog)),
            device_bytes=min(budgets, default=UNKNOWN_BYTES),
            link_bytes_per_s=_link(settings, rows),
            wire_bytes_per_s=LINK_GB_PER_S * 1e9,
            labels=labelled(node.labels),
        )

    def _leave(self, placement: Placement, seen: Seen, now: float) -> Placement:
        """Let models leave nodes, where others serve them; who is gone, or has refused one and
        serves none of its name, has left already."""
        serving = _serving(seen.rows)
        abodes: dict[ModelId, Abode] = {}
        for model, abode in placement.abodes.items():
            if not abode.leaving:
                self._left_s.pop(model, None)
                continue
            there = [node for node in abode.nodes if node in serving.get(model, ())]
            is_late = now - self._left_s.setdefault(model, now) >= LEAVE_S
            refusing = self._refusals.barred.get(model, NOBODY) - serving.get(model, set())
            stay = seen.alive - refusing
            left = tuple(node for node in abode.leaving if node in stay)
            if there and (len(there) == len(abode.nodes) or is_late):
                left = ()
            if left != abode.leaving:
                abodes[model] = Abode(abode.nodes, left, abode.why)
        if not abodes:
            return placement
        return msgspec.structs.replace(placement, abodes=placement.abodes | abodes)


def _as_before(need: Need, before: Placement) -> Need:
    """`need` with as many replicas as there are, at least."""
    abode = before.abodes.get(need.model)
    least = max(need.least, len(abode.nodes) if abode is not None else 0)
    return msgspec.structs.replace(need, least=least)


def _but_barred(needs: Iterable[Need], barred: Mapping[ModelId, frozenset[NodeId]]) -> list[Need]:
    """`needs` with the nodes that refuse them."""
    return [msgspec.structs.replace(need, barred=barred.get(need.model, NOBODY)) for need in needs]


def _abodes(homes: Homes, before: Placement, alive: Collection[NodeId]) -> dict[ModelId, Abode]:
    return {model: abode_of(model, homes, before.abodes.get(model), alive) for model in homes.where}


def _found(catalog: Catalog, seen: Seen) -> Placement:
    """Where models live by what instances say: nobody has placed any, or that was forgotten."""
    known = {spec.id for spec in catalog.models}
    return Placement(
        abodes={
            model: Abode(tuple(sorted(nodes)))
            for model, nodes in _serving(seen.rows).items()
            if model in known
        }
    )


def _asked(catalog: Catalog, seen: Seen) -> object:
    """What, when it changes, has models placed at once."""
    models = {spec.id: (spec.labels, spec.replicas) for spec in catalog.models}
    return models, {node: devices for node, (_, devices) in seen.nodes.items()}


def _serving(rows: Iterable[Instance]) -> dict[ModelId, set[NodeId]]:
    """The nodes whose instances take new requests of a model."""
    serving: dict[ModelId, set[NodeId]] = {}
    for row in rows:
        if row.status.state == "ready" and row.record.role in PREFILLING:
            for model in row.record.models:
                serving.setdefault(model, set()).add(row.record.node)
    return serving


def _staying_bytes(node: NodeId, rows: Sequence[Instance], catalog: Catalog) -> int:
    """What models take there that are to leave, or have requests left."""
    placed = catalog.placement or Placement()
    busy = {
        m for row in rows for counts in (row.status.waiting, row.status.running) for m in counts
    }
    taken = 0
    for spec in catalog.models:
        abode = placed.abodes.get(spec.id)
        if abode is not None and node not in abode.nodes:
            taken += spec.weight_bytes if node in abode.leaving or spec.id in busy else 0
    return taken


def _link(settings: Settings, rows: Iterable[Instance]) -> float:
    """At what rate weights come to a device of a node: as measured, else guessed."""
    if not settings.has_own_memory:
        return NO_LINK
    phase: Phase = "weights"
    totals = [row.status.moved[phase] for row in rows if phase in row.status.moved]
    seconds = sum(total.seconds for total in totals)
    moved = sum(total.moved_bytes for total in totals)
    if seconds > 0.0 and moved > 0:
        return moved / seconds
    return (settings.link_gb_per_s or LINK_GB_PER_S) * 1e9


def _tell(before: Placement | None, after: Placement) -> None:
    old: Mapping[ModelId, Abode] = before.abodes if before is not None else {}
    for model, abode in after.abodes.items():
        if old.get(model) != abode:
            log.info(
                "model placed model=%s nodes=%s leaving=%s why=%s",
                *(model, _short(abode.nodes), _short(abode.leaving), abode.why),
            )


def _short(nodes: Iterable[NodeId]) -> str:
    return ",".join(node[:8] for node in nodes) or "-"
