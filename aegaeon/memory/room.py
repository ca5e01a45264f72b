"""Whether a machine has the room for a layout of bytes: refused at start-up, with all the numbers.

The supervisor lays it out once and passes what it chose on to its processes, as settings. No torch.
"""

import logging
from collections.abc import Sequence

import msgspec

from aegaeon.config import Settings
from aegaeon.errors import BudgetTooSmall
from aegaeon.memory.budget import (
    GB,
    LEAST_SEQUENCES,
    PROCESS_BYTES,
    SHARED_RESERVE_BYTES,
    NodeBudget,
    gb,
    largest_bytes,
    lay_out,
    least_kv_bytes,
)
from aegaeon.memory.machine import Machine
from aegaeon.types import ModelSpec

LOG = logging.getLogger(__name__)


def settle(settings: Settings, specs: Sequence[ModelSpec], machine: Machine) -> Settings:
    """Return `settings` with the bytes chosen where they were left open, so that all processes
    have the same layout, and the count of instances likewise; warn where others use what it takes.
    Raises BudgetTooSmall as `lay_out` and `check_room`."""
    if settings.device == "null":
        return settings
    settings, node = choose_layout(settings, specs, machine)
    if node.total_bytes > machine.unused_bytes:
        LOG.warning("%s", crowded(node, machine))
    return msgspec.structs.replace(
        settings,
        model_cache_budget_gb=node.weight_bytes / GB,
        kv_budget_gb=node.instance.kv_bytes / GB,
        device_memory_gb=node.instance.device_bytes / GB,
    )


def choose_layout(
    settings: Settings, specs: Sequence[ModelSpec], machine: Machine
) -> tuple[Settings, NodeBudget]:
    """Return the layout, and the settings that it is of: with one instance where the count was left
    open and there is no room for more, or not for whole contexts at each. Raises as `settle`."""
    if settings.colocated_count or settings.colocated < 2:
        return settings, _fitting(settings, specs, machine)
    alone = msgspec.structs.replace(settings, colocated_count=1)
    try:
        several = _fitting(settings, specs, machine)
    except BudgetTooSmall as error:
        node = _fitting(alone, specs, machine)
        why = f"for {settings.colocated} there is no room: {error}"
    else:
        node = _fitting(alone, specs, machine)
        cut = [
            spec.id
            for spec in specs
            if several.instance.kv_bytes < _context_bytes(spec) <= node.instance.kv_bytes
        ]
        if not cut:
            return settings, several
        why = (
            f"each of {settings.colocated} would hold {gb(several.instance.kv_bytes)} of keys and "
            f"values, less than the whole context of {', '.join(cut)}; --colocated-count "
            f"{settings.colocated} has them all the same"
        )
    LOG.warning("one instance is started, %s", why)
    return alone, node


def _fitting(settings: Settings, specs: Sequence[ModelSpec], machine: Machine) -> NodeBudget:
    """Lay out what has to fit."""
    node = lay_out(settings, specs, machine)
    check_room(node, specs, machine)
    return node


def _context_bytes(spec: ModelSpec) -> int:
    return spec.context_tokens * spec.kv_token_bytes


def check_room(node: NodeBudget, specs: Sequence[ModelSpec], machine: Machine) -> None:
    """Raise BudgetTooSmall with all the numbers when the layout is more than the machine has; the
    remedies are those that can help: a part at its least size is not one."""
    each = node.instance
    cached = f"weights {gb(node.weight_bytes)}, keys and values {node.instances} x "
    cached += f"{gb(each.kv_bytes)}, tables {gb(SHARED_RESERVE_BYTES)}"
    if node.shared_bytes > machine.shared_free_bytes:
        raise BudgetTooSmall(
            f"the layout takes {gb(node.shared_bytes)} of /dev/shm, which has "
            f"{gb(machine.shared_free_bytes)} free: {cached}; "
            + _lower(node, specs, is_shared=True, otherwise="serve smaller models")
            + ", or give /dev/shm more (mount -o remount,size=, docker --shm-size)"
        )
    _check_device_room(node, machine)
    if node.total_bytes > machine.memory_bytes:
        raise BudgetTooSmall(
            f"the layout takes {gb(node.total_bytes)} of memory, there are "
            f"{gb(machine.memory_bytes)}: {cached}, {node.instances} x (device "
            f"{gb(each.device_bytes)}, stage {gb(each.stage_bytes)}, workspace "
            f"{gb(each.workspace_bytes)}, processes "
            f"{gb(PROCESS_BYTES + each.grammar_host_bytes)}), proxy {gb(node.front_bytes)}; "
            + _lower(node, specs, is_shared=False, otherwise="serve smaller models, or add memory")
        )


def _check_device_room(node: NodeBudget, machine: Machine) -> None:
    """Raise BudgetTooSmall where instances take more than the device has, if that is known."""
    each = node.instance
    taken = node.instances * (each.device_bytes + each.device_workspace_bytes)
    if not each.is_device_in_host and 0 < machine.device_bytes < taken:
        raise BudgetTooSmall(
            f"the device has {gb(machine.device_bytes)}, {node.instances} x (weights "
            f"{gb(each.device_weight_bytes)}, keys and values {gb(each.device_kv_bytes)}, "
            f"workspace {gb(each.device_workspace_bytes)}) are asked for; lower --device-memory-gb"
            + (" or the count of instances" if node.instances > 1 else "")
        )


def _lower(node: NodeBudget, specs: Sequence[ModelSpec], is_shared: bool, otherwise: str) -> str:
    """Return which settings to lower so that less of memory, or of /dev/shm, is taken."""
    each = node.instance
    flags = {
        "--model-cache-budget-gb": node.weight_bytes > largest_bytes(specs),
        "--kv-budget-gb": each.kv_bytes > LEAST_SEQUENCES * least_kv_bytes(specs),
        "--device-memory-gb": not is_shared and each.device_weight_bytes > largest_bytes(specs),
        "the count of instances (--colocated-count, --prefill-count, --decode-count)": (
            node.instances > 1
        ),
    }
    named = [flag for flag, can_help in flags.items() if can_help]
    if not named:
        return otherwise
    return "lower " + " or ".join(filter(None, (", ".join(named[:-1]), named[-1])))


def crowded(node: NodeBudget, machine: Machine) -> str:
    """Say that others use memory which the layout takes."""
    return (
        f"the layout takes up to {gb(node.total_bytes)} of memory, of which only "
        f"{gb(machine.unused_bytes)} are unused now; stop what else runs (another server?), or "
        "set --model-cache-budget-gb and --kv-budget-gb lower"
    )
