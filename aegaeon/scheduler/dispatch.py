"""Where a request goes: pure choices among the instances of a routing snapshot.

New and resumed requests go to an instance that prefills, prefilled ones to one that decodes.
Recording the assignment and sending the request are the business of who asks.
"""

import hashlib
from collections.abc import Mapping

from aegaeon.types import Instance, InstanceId, ModelId, Role


def dispatch(
    instances: tuple[Instance, ...], model: ModelId, assigned: Mapping[InstanceId, int]
) -> InstanceId | None:
    """Return the instance that should prefill a request for `model`, or None when none can.

    Only ready instances that prefill and serve the model count. Their load is what they published
    plus `assigned`, the requests sent there since that snapshot. One load step is worth more than
    where the weights are only beyond `STICKINESS` requests: so models keep their homes, yet a
    busy home is relieved. Ties go to the model's home (rendezvous hash), then to the lower id.
    """
    able = [i for i in instances if i.record.role in PREFILLING and _is_able(i, model)]
    return _cheapest(able, model, assigned)


def dispatch_prefilled(
    instances: tuple[Instance, ...],
    model: ModelId,
    kv_bytes: int,
    assigned: Mapping[InstanceId, int],
) -> InstanceId | None:
    """Return the instance that should decode a request with `kv_bytes` of KV, or None.

    As `dispatch`, among the ready instances that decode and have room for the KV by what they
    published. `assigned` counts those on their way there.
    """
    able = [
        i
        for i in instances
        if i.record.role in DECODING and _is_able(i, model) and i.status.kv_free_bytes >= kv_bytes
    ]
    return _cheapest(able, model, assigned)


def can_serve(instances: tuple[Instance, ...]) -> bool:
    """Whether some ready instance prefills and some ready one decodes."""
    roles = {i.record.role for i in instances if i.status.state == "ready"}
    return not roles.isdisjoint(PREFILLING) and not roles.isdisjoint(DECODING)


PREFILLING: tuple[Role, ...] = ("prefill", "colocated")
DECODING: tuple[Role, ...] = ("decode", "colocated")
STICKINESS = 4  # requests of other models that a load of weights is worth waiting behind


def _is_able(instance: Instance, model: ModelId) -> bool:
    return instance.status.state == "ready" and model in instance.record.models


def _cheapest(
    able: list[Instance], model: ModelId, assigned: Mapping[InstanceId, int]
) -> InstanceId | None:
    if not able:
        return None
    chosen = min(able, key=lambda i: (_cost(i, model, assigned), _home_rank(i, model)))
    return chosen.record.id


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
