"""Which models live on which nodes: a pure choice from what nodes have, what models need and where
they live now. How the weights come there, and when, is the business of who asks.

Replicas are as many as the load needs, each goes to the least busy node that can take it, the
largest first (Graham's list schedule), and whoever lives well stays.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import msgspec

from aegaeon.scheduler.levels import Levels, Node, NodeId
from aegaeon.types import ModelId

Where = Mapping[ModelId, tuple[NodeId, ...]]
Why = Literal["new", "lost", "refused", "busier", "crowded"]
WhyDropped = Literal["unwanted", "idle", "room", "moved"]


class Need(msgspec.Struct, frozen=True, kw_only=True):
    """What a model needs: `busy` seconds of devices in a second, and `loads_per_s`, how often its
    weights come over the link to a device, both measured, of all its replicas together. A node must
    have all `labels`, and is none of `barred`, which have refused it. It has at least so many
    replicas of its own (0: as the rules say)."""

    model: ModelId
    weight_bytes: int
    busy: float = 0.0
    loads_per_s: float = 0.0
    labels: frozenset[str] = frozenset()
    least: int = 0
    barred: frozenset[NodeId] = frozenset()


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """`full`: the share of a node's time, or link, that is planned with; where nodes have more time
    than they need, only `margin` times what they are busy in the mean, but never less than `easy`.
    A model has one replica more when those it has would be busier than that, one less when the rest
    would not be by far: `spare`. A node that is more than full is crowded: a replica moves to a
    node that is not, or if the busier one of both is less busy then by `gain`."""

    full: float = 0.75
    margin: float = 1.5
    easy: float = 0.4
    spare: float = 0.67
    gain: float = 0.05
    least: int = 1  # replicas of each model
    most_moves: int = 64  # from crowded nodes, in one round


class Move(msgspec.Struct, frozen=True):
    """`model` is to live on `to`. The weights are fetched from `source`, a node that has them now;
    None: from where models come from. `leaves`, if any, drops them once they have come: requests
    that run there end there."""

    model: ModelId
    to: NodeId
    why: Why
    source: NodeId | None = None
    leaves: NodeId | None = None


class Drop(msgspec.Struct, frozen=True):
    """`node` gets no more requests of `model`, and forgets it once the last has ended."""

    model: ModelId
    node: NodeId
    why: WhyDropped


class Placed(msgspec.Struct, frozen=True):
    """A placement, and how to get there. `left` have no room anywhere, `short` fewer replicas than
    they need; `levels` are the busy shares of the nodes."""

    where: dict[ModelId, tuple[NodeId, ...]]
    moves: tuple[Move, ...]
    drops: tuple[Drop, ...]
    left: tuple[ModelId, ...]
    short: tuple[ModelId, ...]
    levels: dict[NodeId, float]


def place(
    nodes: Sequence[Node],
    needs: Sequence[Need],
    present: Where,
    rules: Rules = Rules(),  # noqa: B008  frozen
) -> Placed:
    """Return where models of `needs` live on `nodes`, from `present` on; nodes that are not there
    any more have lost theirs. The same arguments give the same result."""
    return _Round(nodes, needs, present, rules).run()


class _Round:
    """One placement in the making."""

    def __init__(
        self, nodes: Sequence[Node], needs: Sequence[Need], present: Where, rules: Rules
    ) -> None:
        self._levels = Levels(nodes, min((need.weight_bytes for need in needs), default=0))
        self._needs = {need.model: need for need in needs}
        mean = math.fsum(need.busy for need in needs) / max(self._levels.devices, 1)
        self._full = min(rules.full, max(rules.easy, rules.margin * mean))
        self._present = present
        self._rules = rules
        self._where: dict[ModelId, list[NodeId]] = {}
        self._wanted: dict[ModelId, int] = {}
        self._moves: dict[tuple[ModelId, NodeId], Move] = {}
        self._drops: list[Drop] = []
        self._sent: dict[NodeId, int] = {}  # fetches from each node

    def run(self) -> Placed:
        """Keep, trim, fill, grow, relieve."""
        self._drop_unwanted()
        for need in self._needs.values():
            self._count(need)
        for need in self._needs.values():
            self._keep(need)
        self._trim()
        # The largest first; the name makes the order whole.
        order = sorted(self._needs.values(), key=lambda need: (-self._size(need), need.model))
        for need in order:
            if self._where[need.model] or self._fill(need):
                self._grow(need)
        self._relieve()
        for need in order:  # who left may have made room
            if not self._where[need.model]:
                self._fill(need)
        lacks = [n.model for n in order if len(self._where[n.model]) < self._wanted[n.model]]
        return Placed(
            where={model: tuple(where) for model, where in self._where.items()},
            moves=tuple(self._moves.values()),
            drops=tuple(self._drops),
            left=tuple(model for model in lacks if not self._where[model]),
            short=tuple(model for model in lacks if self._where[model]),
            levels=self._levels.shown(),
        )

    # How many

    def _size(self, need: Need) -> float:
        """The busy share of a node that one replica takes."""
        count = self._wanted[need.model]
        return max(
            need.busy / count / max(self._levels.usual(need.labels, need.weight_bytes), 1),
            need.loads_per_s * need.weight_bytes / count / self._levels.fastest_link,
        )

    def _count(self, need: Need) -> None:
        """More only when those there are full, fewer only when the rest would have room to spare:
        between the two, what is stays."""
        rules = self._rules
        devices = self._levels.usual(need.labels, need.weight_bytes)
        possible = max(1, self._levels.able(need.labels, need.weight_bytes, need.barred))
        least = min(max(1, need.least or rules.least), possible)
        now = len(self._present.get(need.model, ()))
        if not devices:
            self._wanted[need.model] = least
            return
        at_least = math.ceil(need.busy / (self._full * devices) - 1e-9)
        at_most = math.ceil(need.busy / (rules.spare * self._full * devices) - 1e-9)
        wanted = max(at_least, min(now, at_most))
        self._wanted[need.model] = min(max(least, wanted), possible)

    # What stays

    def _drop_unwanted(self) -> None:
        for model, nodes in self._present.items():
            if model not in self._needs:
                self._drops += [Drop(model, node, "unwanted") for node in nodes]

    def _keep(self, need: Need) -> None:
        """As many as are wanted stay where they are; those on the least busy nodes first."""
        levels = self._levels
        there = [node for node in self._present.get(need.model, ()) if levels.knows(node)]
        kept: list[NodeId] = []
        for node in sorted(there, key=lambda node: (levels.level(node), node)):
            if len(kept) == self._wanted[need.model]:
                self._drops.append(Drop(need.model, node, "idle"))
            elif node not in need.barred and levels.is_able(node, need.labels, need.weight_bytes):
                kept.append(node)
                self._take(need, node, 1)
            else:
                self._drops.append(Drop(need.model, node, "unwanted"))
        self._where[need.model] = kept

    def _trim(self) -> None:
        """Nodes that hold more than they have room for, having lost some, give up what others have,
        and then what is least busy."""
        for node in self._levels.overfull():
            held = [self._needs[m] for m, where in self._where.items() if node in where]
            held.sort(
                key=lambda need: (len(self._where[need.model]) == 1, self._size(need), need.model)
            )
            while self._levels.room(node) < 0:
                self._forget(held.pop(0), node, "room")

    # Who comes

    def _fill(self, need: Need) -> bool:
        """Find a first place; where there is no room, what is elsewhere too makes some."""
        node = self._best(need)
        if node is None:
            node = self._make_room(need)
        if node is None:
            return False
        why: Why = self._why_gone(need) if self._present.get(need.model) else "new"
        self._come(need, node, why)
        return True

    def _why_gone(self, need: Need) -> Why:
        """Why it is not where it was."""
        refused = need.barred.intersection(self._present.get(need.model, ()))
        return "refused" if any(self._levels.knows(node) for node in refused) else "lost"

    def _grow(self, need: Need) -> None:
        where = self._where[need.model]
        while len(where) < self._wanted[need.model]:
            node = self._best(need)
            if node is None:
                return
            was = len(self._present.get(need.model, ()))
            why: Why = "new" if not was else "busier"
            if len(where) < was:
                why = self._why_gone(need)
            self._come(need, node, why)

    def _best(self, need: Need) -> NodeId | None:
        but = need.barred.union(self._where[need.model])
        return self._levels.best(need.labels, need.weight_bytes, self._parts(need), but)

    def _make_room(self, need: Need) -> NodeId | None:
        """Let a node give up models that live elsewhere, too: the one that has to give up least."""
        best: list[Need] = []
        chosen = None
        for node, free in self._levels.rooms(need.labels, need.weight_bytes):
            if node in need.barred:
                continue
            given, missing = [], need.weight_bytes - free
            for other in self._spares(node):
                if missing <= 0:
                    break
                given.append(other)
                missing -= other.weight_bytes
            if missing <= 0 and (chosen is None or len(given) < len(best)):
                best, chosen = given, node
        if chosen is not None:
            for other in best:
                self._forget(other, chosen, "room")
        return chosen

    def _spares(self, node: NodeId) -> Iterable[Need]:
        """Models on `node` that live elsewhere, too: the largest first."""
        held = [
            self._needs[model]
            for model, where in self._where.items()
            if len(where) > 1 and node in where
        ]
        return sorted(held, key=lambda need: (-need.weight_bytes, need.model))

    def _come(self, need: Need, node: NodeId, why: Why, leaves: NodeId | None = None) -> None:
        source = leaves or self._source(need.model)
        if source is not None:
            self._sent[source] = self._sent.get(source, 0) + 1
        self._moves[need.model, node] = Move(need.model, node, why, source, leaves)
        self._where[need.model].append(node)
        self._take(need, node, 1)

    def _source(self, model: ModelId) -> NodeId | None:
        """A node that has the weights now; the one that sends least."""
        there = [node for node in self._present.get(model, ()) if self._levels.knows(node)]
        return min(there, key=lambda node: (self._sent.get(node, 0), node), default=None)

    # Who goes elsewhere

    def _relieve(self) -> None:
        """While a node is crowded and it helps, its best fitting replica moves."""
        crowded = [n for n in self._levels.busiest_first() if self._is_crowded(n)]
        held: dict[NodeId, list[Need]] = {node: [] for node in crowded}
        for model, where in self._where.items():
            for node in where:
                if node in held and (model, node) not in self._moves:
                    held[node].append(self._needs[model])
        left = self._rules.most_moves
        for node in crowded:
            while left and self._is_crowded(node) and self._move_one(node, held[node]):
                left -= 1

    def _is_crowded(self, node: NodeId) -> bool:
        return self._levels.level(node) > self._rules.full

    def _move_one(self, node: NodeId, held: list[Need]) -> bool:
        """Move what leaves the busier one of both nodes least busy, if that is worth a move: to a
        node that is not crowded then, or by `gain`."""
        rules, levels = self._rules, self._levels
        level = levels.level(node)
        best: tuple[float, Need, NodeId] | None = None
        for need in sorted(held, key=lambda need: (-self._size(need), need.model)):
            parts = self._parts(need)
            left = levels.without(node, parts)
            if level - left < rules.gain / 5:
                continue  # hardly any
            to = self._best(need)
            if to is None:
                continue
            after = levels.after(to, parts)
            worse = max(after, left)
            is_worth = after <= rules.full or worse < level - rules.gain
            if is_worth and (best is None or worse < best[0]):
                best = worse, need, to
        if best is None:
            return False
        _, need, to = best
        held.remove(need)
        self._come(need, to, "crowded", leaves=node)
        self._forget(need, node, "moved")
        return True

    # Accounts

    def _parts(self, need: Need) -> tuple[float, float]:
        """What one replica takes of devices, and of links in bytes a second."""
        count = self._wanted[need.model]
        return need.busy / count, need.loads_per_s * need.weight_bytes / count

    def _take(self, need: Need, node: NodeId, sign: int) -> None:
        busy, link = self._parts(need)
        self._levels.add(node, sign * need.weight_bytes, sign * busy, sign * link)

    def _forget(self, need: Need, node: NodeId, why: WhyDropped) -> None:
        self._where[need.model].remove(node)
        self._take(need, node, -1)
        if self._moves.pop((need.model, node), None) is None:  # else it was to come in this round
            self._drops.append(Drop(need.model, node, why))
