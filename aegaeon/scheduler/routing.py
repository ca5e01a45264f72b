"""To which of the nodes where its model lives a request goes: pure, and as cheap among thousands of
nodes as among a few."""

import math
from collections.abc import Mapping
from typing import Protocol

from aegaeon.scheduler.levels import NodeId
from aegaeon.scheduler.placement import Where
from aegaeon.types import ModelId

# Looking at a few, with the last one chosen among them, balances nearly as well as looking at all
# (Mitzenmacher, Prabhakar and Shah, 2002), and better when what is seen is old: nobody is at once
# everybody's best.
LOOKS = 4
STRIDE = 0.6180339887  # of a model's nodes, between two looks: none is soon seen again


class Site(Protocol):
    """A node as requests see it."""

    @property
    def load(self) -> float:
        """How busy it is, in the measure of its policy."""

    def wait_s(self, model: ModelId) -> float:
        """Return the seconds predicted before the device that would take one more request of
        `model` prefills it: those ahead of it, and its weights where they have to come first."""

    def is_resident(self, model: ModelId) -> bool:
        """Whether a device there has the weights of `model`, or gets them."""


class Router:
    """Sends each request to the node, of those it looks at, that makes it wait least; with equal
    waits first to weights that are there, then to who is least busy."""

    def __init__(self, looks: int = LOOKS) -> None:
        """`looks`: at so many nodes for a request, at most."""
        assert looks >= 2
        self._looks = looks
        self._nodes: dict[ModelId, tuple[NodeId, ...]] = {}
        self._last: dict[ModelId, int] = {}  # the index of the last one chosen
        self._turns: dict[ModelId, int] = {}

    def settle(self, where: Where) -> None:
        """Models of `where` are served there from now on, and nowhere else; others stay."""
        for model, nodes in where.items():
            if self._nodes.get(model) == nodes:
                continue
            self._last.pop(model, None)
            if nodes:
                self._nodes[model] = nodes
            else:
                self._nodes.pop(model, None)

    def nodes(self, model: ModelId) -> tuple[NodeId, ...]:
        """Return where `model` is served."""
        return self._nodes.get(model, ())

    def route(self, model: ModelId, sites: Mapping[NodeId, Site]) -> NodeId | None:
        """Return the node for one more request of `model`; None where none of `sites` serves it."""
        nodes = self._nodes.get(model, ())
        if len(nodes) == 1:
            return nodes[0] if nodes[0] in sites else None
        best: tuple[float, bool, float, int] | None = None
        for index in self._candidates(model, len(nodes)):
            site = sites.get(nodes[index])
            if site is None:
                continue
            key = site.wait_s(model), not site.is_resident(model), site.load, index
            if best is None or key < best:
                best = key
        if best is None:
            return self._any(nodes, sites)
        self._last[model] = best[3]
        return nodes[best[3]]

    def _candidates(self, model: ModelId, count: int) -> list[int]:
        """The last one chosen, and some in turn."""
        if count <= self._looks:
            return list(range(count))
        turn = self._turns.get(model, 0)
        self._turns[model] = turn + self._looks - 1
        found = [self._last.get(model, 0)]
        step = round(count * STRIDE)
        while math.gcd(step, count) > 1:
            step += 1
        for number in range(turn, turn + self._looks - 1):
            index = number * step % count
            if index not in found:
                found.append(index)
        return found

    @staticmethod
    def _any(nodes: tuple[NodeId, ...], sites: Mapping[NodeId, Site]) -> NodeId | None:
        """None of those looked at is there: the first one that is."""
        return next((node for node in nodes if node in sites), None)
