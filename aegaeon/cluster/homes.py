"""Where models live, chosen: pure, from what nodes have and what models need. Who keeps to it, and
lets nobody leave before others serve, is placing.py.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from aegaeon.placements import Abode, Rule
from aegaeon.scheduler.levels import Node, NodeId
from aegaeon.scheduler.placement import Need, Placed, Rules, Where, place
from aegaeon.types import ModelId

EVERYWHERE = "everywhere"
NOWHERE = "no_labels"  # why a model lives on no node: none has its labels
TOO_LARGE = "too_large"  # for any device: those that may have it say so, to whoever looks
REFUSED = "refused_by_all"  # by all that may have it: one of them says why
MOST_OVERFULL = 1 << 20  # times what caches hold: far more than disks do


class Homes(NamedTuple):
    """Where models live by which rule, why those whose place has changed do, and how busy their
    nodes are then."""

    rule: Rule
    where: dict[ModelId, tuple[NodeId, ...]]
    why: dict[ModelId, str]
    levels: dict[NodeId, float]


def choose(nodes: Sequence[Node], needs: Sequence[Need], present: Where, rules: Rules) -> Homes:
    """Return where models of `needs` live on `nodes`, who live at `present`.

    With `rules.least` of 0: on all nodes that may have them, if each has the room for all it may
    have; else by load. Where the caches are too small for all models together, each takes the same
    share more than it has room for: none is left out, and some come from the disk when asked for.
    """
    if rules.least <= 0 and all(_holds_all(node, needs) for node in nodes):
        return _everywhere(nodes, needs, present)
    rules = msgspec.structs.replace(rules, least=max(1, rules.least))
    hopeless = {
        need.model: _hopeless(nodes, need, present.get(need.model, ()))
        for need in needs
        if not _fits(nodes, need)
    }
    hopeful = [need for need in needs if need.model not in hopeless]
    factor = 1.0
    while True:
        placed = place([_larger(node, factor) for node in nodes], hopeful, present, rules)
        if not placed.left or factor > MOST_OVERFULL:
            break
        factor *= 1.5
    where = {model: at for model, (at, _) in hopeless.items()}
    why = {model: reason for model, (_, reason) in hopeless.items()}
    return Homes("load", placed.where | where, _reasons(placed) | why, placed.levels)


def abode_of(
    model: ModelId, homes: Homes, before: Abode | None, alive: Collection[NodeId]
) -> Abode:
    """Return where `model` is from now on, as chosen: those of its nodes `before` that are `alive`
    and not chosen go when the others serve."""
    nodes = tuple(sorted(homes.where[model]))
    if before is None:
        return Abode(nodes, (), homes.why.get(model, "new"))
    were = (*before.nodes, *before.leaving)
    leaving = tuple(sorted({node for node in were if node in alive and node not in nodes}))
    # Whoever stays where all refused it is tried there anew.
    why = homes.why.get(model, "new" if before.why == REFUSED else before.why)
    is_old = (why == REFUSED) == (before.why == REFUSED)
    if nodes == before.nodes and leaving == before.leaving and is_old:
        return before
    return Abode(nodes, leaving, why)


def _everywhere(nodes: Sequence[Node], needs: Sequence[Need], present: Where) -> Homes:
    where: dict[ModelId, tuple[NodeId, ...]] = {}
    why: dict[ModelId, str] = {}
    for need in needs:
        at = tuple(node for node in _allowed(nodes, need) if node not in need.barred)
        reason = EVERYWHERE
        if not _fits(nodes, need):
            at, reason = _hopeless(nodes, need, present.get(need.model, ()))
        where[need.model], why[need.model] = at, reason
    levels = dict.fromkeys((node.id for node in nodes), 0.0)
    devices = {node.id: node.devices for node in nodes}
    for need in needs:
        for node in where[need.model]:  # requests go to all of them alike
            levels[node] += need.busy / len(where[need.model]) / devices[node]
    return Homes("everywhere", where, why, levels)


def _allowed(nodes: Sequence[Node], need: Need) -> tuple[NodeId, ...]:
    """The nodes that have the labels of a model."""
    return tuple(node.id for node in nodes if need.labels <= node.labels)


def _hopeless(
    nodes: Sequence[Node], need: Need, present: Collection[NodeId]
) -> tuple[tuple[NodeId, ...], str]:
    """Where a model is left that no node can take, and why: what all have refused stays where it
    is, for its files need not come to all of them."""
    allowed = _allowed(nodes, need)
    if not allowed:
        return (), NOWHERE
    if all(need.weight_bytes > node.device_bytes for node in nodes if node.id in allowed):
        return allowed, TOO_LARGE
    return tuple(node for node in allowed if node in present) or allowed[:1], REFUSED


def _fits(nodes: Sequence[Node], need: Need) -> bool:
    return any(_may(node, need) for node in nodes)


def _may(node: Node, need: Need) -> bool:
    is_able = need.labels <= node.labels and need.weight_bytes <= node.device_bytes
    return is_able and node.id not in need.barred


def _holds_all(node: Node, needs: Iterable[Need]) -> bool:
    return sum(need.weight_bytes for need in needs if _may(node, need)) <= node.cache_bytes


def _larger(node: Node, factor: float) -> Node:
    if factor == 1.0:
        return node
    return msgspec.structs.replace(node, cache_bytes=int(node.cache_bytes * factor))


def _reasons(placed: Placed) -> dict[ModelId, str]:
    """Why models come and go; that one comes says more."""
    gone = {drop.model: str(drop.why) for drop in placed.drops}
    came: Mapping[ModelId, str] = {move.model: str(move.why) for move in placed.moves}
    return gone | dict(came)
