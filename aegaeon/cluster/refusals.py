"""Which nodes have refused which models, by what their instances say: those are no homes for them.

Remembered as long as a model's spec is the same and the node lives: what is asked for no more is
refused no more, and would else go back and forth.
"""

from collections.abc import Collection, Iterable, Mapping

from aegaeon.scheduler.dispatch import PREFILLING
from aegaeon.scheduler.levels import NodeId
from aegaeon.specs import Catalog
from aegaeon.types import Instance, ModelId, ModelSpec


class Refusals:
    """Owned by the controller's thread."""

    def __init__(self) -> None:
        """Nobody has refused anything."""
        self._barred: dict[ModelId, tuple[ModelSpec, frozenset[NodeId]]] = {}

    @property
    def barred(self) -> Mapping[ModelId, frozenset[NodeId]]:
        """The nodes that cannot take a model; none has an empty set."""
        return {model: nodes for model, (_, nodes) in self._barred.items()}

    def note(self, catalog: Catalog, rows: Iterable[Instance], alive: Collection[NodeId]) -> None:
        """Take in what `rows` say of the models of `catalog`; forget who is not `alive`."""
        refused = _refused(rows, catalog.version)
        barred: dict[ModelId, tuple[ModelSpec, frozenset[NodeId]]] = {}
        for model in self._barred.keys() | refused.keys():
            spec = catalog.find(model)
            if spec is None:
                continue
            known, nodes = self._barred.get(model, (spec, frozenset[NodeId]()))
            before = nodes if known == spec else frozenset[NodeId]()
            now = (before | refused.get(model, frozenset[NodeId]())).intersection(alive)
            if now:
                barred[model] = spec, now
        self._barred = barred


def _refused(rows: Iterable[Instance], version: int) -> dict[ModelId, set[NodeId]]:
    """The nodes all of whose ready instances that take new requests refuse a model. One that has
    not seen the catalogue yet may speak of what was wanted before: it does not count."""
    takers: dict[NodeId, list[Instance]] = {}
    for row in rows:
        if row.status.state == "ready" and row.record.role in PREFILLING:
            takers.setdefault(row.record.node, []).append(row)
    refused: dict[ModelId, set[NodeId]] = {}
    for node, here in takers.items():
        told = [row.status.refused if row.status.catalog >= version else {} for row in here]
        for model in set(told[0]).intersection(*told):
            refused.setdefault(model, set()).add(node)
    return refused
