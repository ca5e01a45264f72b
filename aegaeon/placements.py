"""On which nodes of a cluster its models live, as its controller says and all processes follow.

Only data, frozen; it stands beside types.py. Who chooses is aegaeon/cluster, with the policy of
scheduler/placement.py.
"""

from typing import Literal

import msgspec

# By what models are placed: everywhere, where each node holds all it may have; else by load.
Rule = Literal["everywhere", "load"]


class Abode(msgspec.Struct, frozen=True, array_like=True):
    """Where a model lives. `nodes` serve it, or do so once its weights are there; one of `leaving`,
    which are others, goes on until they do. `why` is the reason of the last change."""

    nodes: tuple[str, ...]
    leaving: tuple[str, ...] = ()
    why: str = "new"


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """The abodes of models by their ids. One that has none yet, having just come, is served on all
    nodes that can, unless it asks for labels: which node has them only its abode says."""

    rule: Rule = "everywhere"
    abodes: dict[str, Abode] = {}

    def is_home(self, model: str, node: str, is_open: bool) -> bool:
        """Whether `model` is to be served on `node`; where nobody has placed it, if it `is_open`
        to all."""
        abode = self.abodes.get(model)
        if abode is None:
            return is_open
        return node in abode.nodes or node in abode.leaving
