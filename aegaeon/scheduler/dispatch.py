"""Where a request goes: a pure choice among the instances of a routing snapshot.

Recording the assignment and sending the request are the proxy's business.
"""

import hashlib
from collections.abc import Mapping

from aegaeon.types import Instance, InstanceId, ModelId


def dispatch(
    instances: tuple[Instance, ...], model: ModelId, assigned: Mapping[InstanceId, int]
) -> InstanceId | None:
    """Return the instance that should serve a request for `model`, or None when none can.

    Only ready instances that serve the model count. Their load is what they published plus
    `assigned`, the requests sent there since that snapshot. One load step is worth more than
    where the weights are only beyond `STICKINESS` requests: so models keep their homes, yet a
    busy home is relieved. Ties go to the model's home (rendezvous hash), then to the lower id.
    """
    able = [i for i in instances if i.status.state == "ready" and model in i.record.models]
    if not able:
        return None
    chosen = min(able, key=lambda i: (_cost(i, model, assigned), _home_rank(i, model)))
    return chosen.record.id


STICKINESS = 4  # requests of other models that a load of weights is worth waiting behind


def _cost(instance: Instance, model: ModelId, assigned: Mapping[InstanceId, int]) -> int:
    """Requests before ours there, with what it costs that the weights are not at hand."""
    status = instance.status
    load = sum(status.waiting.values()) + sum(status.running.values())
    load += assigned.get(instance.record.id, 0)
    if model == status.current:
        return load
    if model == status.loading or model in status.resident:
        return load + 1
    return load + 1 + STICKINESS


def _home_rank(instance: Instance, model: ModelId) -> tuple[int, InstanceId]:
    """Lower is nearer to home; the same in every process."""
    name = f"{model}\0{instance.record.id}".encode()
    digest = hashlib.blake2b(name, digest_size=8).digest()
    return int.from_bytes(digest, "big"), instance.record.id
