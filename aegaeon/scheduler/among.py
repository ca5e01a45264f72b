"""Where live requests go in a cluster: the router chooses among the nodes that serve a model, the
policy's dispatcher among the instances of that node. On one node there is nothing to route.
"""

from collections.abc import Callable, Mapping, Sequence

from aegaeon.measures import Speed
from aegaeon.scheduler.dispatch import (
    PREFILLING,
    Choice,
    LiveDispatcher,
    LivePlace,
    Prompt,
    Unseen,
    is_able,
    soonest,
)
from aegaeon.scheduler.levels import NodeId
from aegaeon.scheduler.places import Dispatcher
from aegaeon.scheduler.routing import Router
from aegaeon.types import Instance, ModelId

# Of a model that no instance has told the speed of: nobody has asked for it yet.
UNKNOWN = Speed(token_s=1e-4, load_s=1.0)


class NodeSite:
    """A node as the router sees it: its instances that prefill a model, as they say. `speed` is the
    model's where it is known, and a prompt of `tokens` is to come."""

    def __init__(self, rows: Sequence[Instance], unseen: Unseen, speed: Speed, tokens: int) -> None:
        self._places = [LivePlace(row, unseen.get(row.record.id, {})) for row in rows]
        self._speed = speed
        self._tokens = tokens

    @property
    def load(self) -> float:
        """That of its least busy instance."""
        return min(place.load for place in self._places)

    def wait_s(self, model: ModelId) -> float:
        """Prefills ahead, and the weights where they have to come, at the best instance."""
        return min(self._wait_s(place, model) for place in self._places)

    def is_resident(self, model: ModelId) -> bool:
        """Whether an instance has the weights, or gets them."""
        return any(place.is_resident(model) for place in self._places)

    def _wait_s(self, place: LivePlace, model: ModelId) -> float:
        speed = place.speeds.get(model, self._speed)
        load_s = 0.0 if place.is_resident(model) else speed.load_s
        return place.wait_s(self._tokens * speed.token_s) + load_s


class NodeDispatcher:
    """A LiveDispatcher for each node, whose policy's dispatchers `make` makes, and one Router."""

    def __init__(self, make: Callable[[], Dispatcher]) -> None:
        self._make = make
        self._within: dict[NodeId, LiveDispatcher] = {}
        self._router = Router()

    def dispatch(
        self,
        rows: Sequence[Instance],
        model: ModelId,
        unseen: Unseen,
        prompt: Prompt = Prompt(),  # noqa: B008  frozen
    ) -> Choice | None:
        """Return the instance that should prefill `prompt` for `model`, or None when none can, as
        LiveDispatcher."""
        able = [row for row in rows if row.record.role in PREFILLING and is_able(row, model)]
        nodes: dict[NodeId, list[Instance]] = {}
        for row in able:
            nodes.setdefault(row.record.node, []).append(row)
        if len(nodes) < 2:
            here = able[0].record.node if able else ""
            return self._at(here).dispatch(able, model, unseen, prompt)
        node, was_resident = self._route(nodes, model, unseen, prompt)
        choice = self._at(node).dispatch(nodes[node], model, unseen, prompt)
        if choice is None:
            return None
        nearer = _nearer(able, choice, model, unseen, prompt)
        if nearer is not None:
            return nearer
        if choice.reason == "only_one":  # there, but not of all
            return Choice(choice.instance, "resident" if was_resident else "least_wait")
        return choice

    def _route(
        self,
        nodes: Mapping[NodeId, Sequence[Instance]],
        model: ModelId,
        unseen: Unseen,
        prompt: Prompt,
    ) -> tuple[NodeId, bool]:
        """The node, and whether the weights are there."""
        told = (row.status.speeds.get(model) for rows in nodes.values() for row in rows)
        speed = next((one for one in told if one is not None), UNKNOWN)
        self._router.settle({model: tuple(sorted(nodes))})
        sites = {node: NodeSite(rows, unseen, speed, prompt.tokens) for node, rows in nodes.items()}
        node = self._router.route(model, sites)
        assert node is not None, "every node of the router's has a site"
        return node, sites[node].is_resident(model)

    def _at(self, node: NodeId) -> LiveDispatcher:
        within = self._within.get(node)
        if within is None:
            within = self._within[node] = LiveDispatcher(self._make())
        return within

    def forget(self, nodes: frozenset[NodeId]) -> None:
        """Keep nothing of nodes that are not among `nodes`."""
        for gone in self._within.keys() - nodes:
            del self._within[gone]


def _nearer(
    able: Sequence[Instance], choice: Choice, model: ModelId, unseen: Unseen, prompt: Prompt
) -> Choice | None:
    """An instance of any node that has kept so much of the prompt that its first token comes sooner
    than at `choice`, if there is one."""
    if not prompt.known:
        return None
    places = [LivePlace(row, unseen.get(row.record.id, {})) for row in able]
    chosen = next(place for place in places if place.id == choice.instance)
    best = soonest(places, chosen, model, prompt)
    return None if best is chosen else Choice(best.id, "prefix")
