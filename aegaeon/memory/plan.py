"""What fits on which tier, and what a switch will take: predictions from a layout of bytes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from aegaeon.config import Settings
from aegaeon.memory.budget import GB, Budgets, NodeBudget
from aegaeon.memory.machine import DiskRate, Machine
from aegaeon.models.checkpoint import LoadPlan, plan_load
from aegaeon.types import ModelId, ModelSpec, Quantize

BLOCK_TOKENS = 16
Tier = Literal["device", "memory", "disk"]


class ModelPlan(msgspec.Struct, frozen=True, kw_only=True):
    """A model in a plan. `tier` is where it lies once as many as fit have been loaded in order.

    `kv_tokens` fit in an instance's quota; `sequence_tokens` are those of the longest sequence, of
    which KV times are told. `warm_switch_s` is from the node's cache with KV out and in,
    `cold_switch_s` the same from disk. Times are estimates without any overlap.
    """

    id: ModelId
    tier: Tier
    weight_bytes: int
    file_bytes: int
    kv_token_bytes: int
    kv_tokens: int
    sequence_tokens: int
    disk: DiskRate
    from_disk_s: float
    to_device_s: float
    kv_out_s: float
    kv_in_s: float
    warm_switch_s: float
    cold_switch_s: float


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A layout with what it means for the models. `link_bytes_per_s` is None where no byte moves
    between host and device; `is_link_measured` when it is the speed of memory."""

    device: str
    machine: Machine
    node: NodeBudget
    shared_bytes: int
    total_bytes: int
    link_bytes_per_s: float | None
    is_link_measured: bool
    models: tuple[ModelPlan, ...]


class Probes(msgspec.Struct, frozen=True):
    """How the machine is measured: a file's reading, and a thread's copying in bytes per second."""

    disk: Callable[[Path], DiskRate]
    copy: Callable[[], float]


def make_plan(
    settings: Settings,
    specs: Sequence[ModelSpec],
    node: NodeBudget,
    machine: Machine,
    probes: Probes,
) -> Plan:
    """Predict for `node`, the layout of `specs` on `machine`.

    Reads the models' headers, and of each largest file as much as the probe does.
    Raises ModelNotFound, CheckpointError, UnsupportedModel.
    """
    link = None
    if settings.has_own_memory:
        link = settings.link_gb_per_s * GB or probes.copy()
    tiers = place(specs, node)
    rates: dict[Path, DiskRate] = {}
    models = []
    for spec in specs:
        loading = plan_load(spec.path)
        file = _largest_file(loading)
        if file not in rates:
            rates[file] = probes.disk(file)
        read = _Read(tiers[spec.id], loading.file_bytes, rates[file])
        models.append(_plan_model(spec, read, node.instance, link))
    return Plan(
        device=settings.device,
        machine=machine,
        node=node,
        shared_bytes=node.shared_bytes,
        total_bytes=node.total_bytes,
        link_bytes_per_s=link,
        is_link_measured=link is not None and not settings.link_gb_per_s,
        models=tuple(models),
    )


def place(specs: Sequence[ModelSpec], node: NodeBudget) -> dict[ModelId, Tier]:
    """Say where each model lies once they have been loaded in order while there was room.

    A later one that is smaller may find the room that an earlier one did not; the cache holds the
    same files once, whatever they are served as. On `cpu` the cache is what the device computes on,
    so nothing is nearer to it than memory.
    """
    left_bytes = node.weight_bytes
    cached: set[tuple[str, Quantize]] = set()
    device_bytes = node.instance.device_weight_bytes
    tiers: dict[ModelId, Tier] = {}
    for spec in specs:
        if (spec.path, spec.quantize) not in cached:
            if spec.weight_bytes > left_bytes:
                tiers[spec.id] = "disk"
                continue
            left_bytes -= spec.weight_bytes
            cached.add((spec.path, spec.quantize))
        tiers[spec.id] = "memory"
        if spec.weight_bytes <= device_bytes:
            device_bytes -= spec.weight_bytes
            tiers[spec.id] = "device"
    return tiers


class _Read(msgspec.Struct, frozen=True):
    """Where a model lies and how it comes from disk."""

    tier: Tier
    file_bytes: int
    disk: DiskRate


def _plan_model(spec: ModelSpec, read: _Read, budgets: Budgets, link: float | None) -> ModelPlan:
    block_bytes = BLOCK_TOKENS * spec.kv_token_bytes
    kv_tokens = budgets.kv_bytes // block_bytes * BLOCK_TOKENS
    sequence_tokens = min(spec.context_tokens, kv_tokens)
    from_disk_s = read.file_bytes / read.disk.bytes_per_s
    to_device_s = spec.weight_bytes / link if link else 0.0
    kv_s = sequence_tokens * spec.kv_token_bytes / link if link else 0.0
    return ModelPlan(
        id=spec.id,
        tier=read.tier,
        weight_bytes=spec.weight_bytes,
        file_bytes=read.file_bytes,
        kv_token_bytes=spec.kv_token_bytes,
        kv_tokens=kv_tokens,
        sequence_tokens=sequence_tokens,
        disk=read.disk,
        from_disk_s=from_disk_s,
        to_device_s=to_device_s,
        kv_out_s=kv_s,
        kv_in_s=kv_s,
        warm_switch_s=kv_s + to_device_s + kv_s,
        cold_switch_s=from_disk_s + kv_s + to_device_s + kv_s,
    )


def _largest_file(loading: LoadPlan) -> Path:
    sizes: dict[str, int] = {}
    for tensor in loading.tensors.values():
        sizes[tensor.path] = sizes.get(tensor.path, 0) + tensor.data_bytes
    return Path(max(sizes, key=lambda path: sizes[path]))
