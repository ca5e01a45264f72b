"""Who is served when a device has more to do than it can: as many requests as possible."""

from collections.abc import Sequence
from typing import NamedTuple

from aegaeon.types import ModelId

STAY = 1.3  # so much more worth is a model than one that is shed already, all else equal


class Demand(NamedTuple):
    """What a model asks of a device: the share of its time that keeping up takes, how many
    requests that serves, and whether it is shed now."""

    model: ModelId
    share: float
    requests: float
    is_shed: bool


def shed(demands: Sequence[Demand]) -> frozenset[ModelId]:
    """Return the models to shed so that the others together ask for no more than all the time:
    those with the fewest requests for it."""
    if sum(demand.share for demand in demands) <= 1.0:
        return frozenset()
    total = 0.0
    gone = []
    for demand in sorted(demands, key=_price):
        total += demand.share
        if total > 1.0:
            gone.append(demand.model)
    return frozenset(gone)


def _price(demand: Demand) -> float:
    price = demand.share / demand.requests
    return price * STAY if demand.is_shed else price
