"""How busy nodes are while models are placed on them, and which of them can take one more."""

import heapq
from collections.abc import Collection, Iterator, Sequence
from typing import Annotated

import msgspec

NodeId = str
LOOKS = 4  # at nodes that could take a replica, the least busy first: they may differ in size

Parts = tuple[float, float]  # device seconds a second, and bytes a second over the link


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """A machine: its devices, each with room for `device_bytes` of weights and a link of its own
    from the host; `cache_bytes` of the host hold the weights of what lives there, which come over
    the wire."""

    id: NodeId
    devices: Annotated[int, msgspec.Meta(ge=1)]
    cache_bytes: int
    device_bytes: int
    link_bytes_per_s: Annotated[float, msgspec.Meta(gt=0)]
    wire_bytes_per_s: Annotated[float, msgspec.Meta(gt=0)]
    labels: frozenset[str] = frozenset()


class _Kind:
    """Nodes that can take the same models: the least busy in front, without what has changed since
    it was put there."""

    def __init__(self, node: Node) -> None:
        self.devices = node.devices
        self.device_bytes = node.device_bytes
        self.labels = node.labels
        self.count = 0
        self.heap: list[tuple[float, int]] = []

    def is_able(self, labels: frozenset[str], weight_bytes: int) -> bool:
        return labels <= self.labels and weight_bytes <= self.device_bytes


class Levels:
    """The busy share of each node: of its devices' time or of their links, whichever is more."""

    def __init__(self, nodes: Sequence[Node], least_bytes: int) -> None:
        """`least_bytes`: no model has less; a node with less room takes none."""
        self._nodes = sorted(nodes, key=lambda node: node.id)
        self._at = {node.id: index for index, node in enumerate(self._nodes)}
        assert len(self._at) == len(nodes), "two nodes have one id"
        self._least_bytes = least_bytes
        self._room = [node.cache_bytes for node in self._nodes]
        self._busy = [0.0] * len(nodes)
        self._link = [0.0] * len(nodes)
        self._level = [0.0] * len(nodes)
        self._kinds: list[_Kind] = []
        self._kind_of: list[_Kind] = []
        self._usual: dict[tuple[frozenset[str], tuple[bool, ...]], int] = {}
        self._sort()
        self.devices = sum(node.devices for node in self._nodes)
        links = (node.devices * node.link_bytes_per_s for node in self._nodes)
        self.fastest_link = max(links, default=1.0)

    def _sort(self) -> None:
        kinds: dict[tuple[int, int, frozenset[str]], _Kind] = {}
        for index, node in enumerate(self._nodes):
            key = node.devices, node.device_bytes, node.labels
            kind = kinds.setdefault(key, _Kind(node))
            kind.heap.append((0.0, index))  # a heap already
            kind.count += 1
            self._kind_of.append(kind)
        self._kinds = list(kinds.values())

    # Of nodes

    def knows(self, node: NodeId) -> bool:
        """Whether it is one of ours."""
        return node in self._at

    def level(self, node: NodeId) -> float:
        """Return its busy share."""
        return self._level[self._at[node]]

    def room(self, node: NodeId) -> int:
        """Return the bytes that are free; below 0 where too much is there."""
        return self._room[self._at[node]]

    def is_able(self, node: NodeId, labels: frozenset[str], weight_bytes: int) -> bool:
        """Whether it may take a model with those `labels` and so much weight, if it has room."""
        return self._kind_of[self._at[node]].is_able(labels, weight_bytes)

    def after(self, node: NodeId, parts: Parts) -> float:
        """Return its busy share with `parts` more."""
        return self._with(self._at[node], *parts)

    def without(self, node: NodeId, parts: Parts) -> float:
        """Return its busy share with `parts` less."""
        return self._with(self._at[node], -parts[0], -parts[1])

    def add(self, node: NodeId, weight_bytes: int, busy: float, link: float) -> None:
        """So much comes to live on `node` or, negative, leaves it."""
        index = self._at[node]
        self._room[index] -= weight_bytes
        self._busy[index] += busy
        self._link[index] += link
        self._level[index] = self._with(index, 0.0, 0.0)
        self._push(index)

    # Of all

    def usual(self, labels: frozenset[str], weight_bytes: int) -> int:
        """Return the devices of the middle one of the nodes able to take such a model; 0 without
        any."""
        able = tuple(kind.is_able(labels, weight_bytes) for kind in self._kinds)
        key = labels, able
        if key not in self._usual:
            pairs = zip(self._kinds, able, strict=True)
            sizes = sorted((kind.devices, kind.count) for kind, is_able in pairs if is_able)
            middle = sum(count for _, count in sizes) / 2
            found = 0
            for devices, count in sizes:
                found = devices
                middle -= count
                if middle <= 0:
                    break
            self._usual[key] = found
        return self._usual[key]

    def able(self, labels: frozenset[str], weight_bytes: int, but: Collection[NodeId] = ()) -> int:
        """Return how many nodes, none of `but`, could take such a model if they had room."""
        able = sum(kind.count for kind in self._kinds if kind.is_able(labels, weight_bytes))
        known = (node for node in but if self.knows(node))
        return able - sum(self.is_able(node, labels, weight_bytes) for node in known)

    def best(
        self, labels: frozenset[str], weight_bytes: int, parts: Parts, but: Collection[NodeId]
    ) -> NodeId | None:
        """Return the node, none of `but`, with room that would be least busy with `parts` more;
        only the least busy ones are looked at."""
        found = [
            index
            for kind in self._kinds
            if kind.is_able(labels, weight_bytes)
            for index in self._front(kind, weight_bytes, but)
        ]
        if not found:
            return None
        best = min(found, key=lambda index: (self._with(index, *parts), index))
        return self._nodes[best].id

    def rooms(self, labels: frozenset[str], weight_bytes: int) -> Iterator[tuple[NodeId, int]]:
        """Yield the nodes able to take such a model and the bytes that are free there."""
        for index, node in enumerate(self._nodes):
            if self._kind_of[index].is_able(labels, weight_bytes):
                yield node.id, self._room[index]

    def overfull(self) -> list[NodeId]:
        """Return the nodes that hold more than they have room for."""
        return [node.id for index, node in enumerate(self._nodes) if self._room[index] < 0]

    def busiest_first(self) -> list[NodeId]:
        """Return all nodes in order."""
        order = sorted(range(len(self._nodes)), key=lambda index: (-self._level[index], index))
        return [self._nodes[index].id for index in order]

    def shown(self) -> dict[NodeId, float]:
        """Return all busy shares."""
        return {node.id: self._level[index] for index, node in enumerate(self._nodes)}

    def _front(self, kind: _Kind, weight_bytes: int, but: Collection[NodeId]) -> list[int]:
        """The least busy ones of a kind that have the room."""
        found: list[int] = []
        back: list[tuple[float, int]] = []
        while kind.heap and len(found) < LOOKS:
            entry = heapq.heappop(kind.heap)
            level, index = entry
            if level != self._level[index] or self._room[index] < self._least_bytes:
                continue
            if back and back[-1] == entry:
                continue  # put there twice: it was left and came back
            back.append(entry)
            if self._room[index] >= weight_bytes and self._nodes[index].id not in but:
                found.append(index)
        for entry in back:
            heapq.heappush(kind.heap, entry)
        return found

    def _push(self, index: int) -> None:
        if self._room[index] >= self._least_bytes:
            heapq.heappush(self._kind_of[index].heap, (self._level[index], index))

    def _with(self, index: int, busy: float, link: float) -> float:
        node = self._nodes[index]
        of_link = (self._link[index] + link) / node.link_bytes_per_s
        return max(self._busy[index] + busy, of_link) / node.devices
