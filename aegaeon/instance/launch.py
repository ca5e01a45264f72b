"""What a worker process is told on its stdin, and how it says that it cannot start."""

import msgspec

from aegaeon.config import Settings
from aegaeon.store.names import NEIGHBOURS, SHARED_MEMORY, region_path
from aegaeon.types import InstanceId, ModelSpec

EXIT_DRAINED = 0
EXIT_CRASHED = 1
EXIT_CANNOT_START = 2  # with one line on `status_fd`
EXIT_REPLACED = 3  # the lease was lost; a restart gets a new one
EXIT_DEVICE_LOST = 4  # a new process may have the device again

NODE_CHARS = 12  # of a node's name: as many as tell nodes of a cluster apart


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's settings, models and identity. `status_fd` is an inherited pipe's writing end,
    `work_fd` inherited memory in which to note what is being done (None: nobody asks).

    The node's KV pool is cut for `kv_shapes`, and serves `kv_spare` where it can: of each its
    layers, heads and head_dim. `catalog` is the version that `specs` are of. The
    process before it `was_hung`: it was ended for that. `node` is the machine's name where several
    share a store, and `address` its; else empty.
    """

    settings: Settings
    specs: tuple[ModelSpec, ...]
    instance: InstanceId
    index: int
    incarnation: int
    status_fd: int
    parent_pid: int
    kv_shapes: tuple[tuple[int, int, int], ...] = ()
    kv_spare: tuple[tuple[int, int, int], ...] = ()
    catalog: int = 0
    was_hung: bool = False
    work_fd: int | None = None
    node: str = ""
    address: str = ""


def mailbox_address(instance: InstanceId, incarnation: int) -> str:
    """Where an incarnation receives; its successor receives elsewhere."""
    return f"{instance}.{incarnation}"


def memory_name(domain: str, node: str) -> str:
    """Return what the shared memory of a domain's `node` is called; empty: the only one."""
    return f"{domain}-{node[:NODE_CHARS]}" if node else domain


def neighbours_path(settings: Settings, node: str) -> str:
    """Return where instances of `node` say that they compute; empty where the settings share the
    processors out."""
    if settings.threads_per_instance or settings.instance_count == 1:
        return ""
    return str(region_path(SHARED_MEMORY, memory_name(settings.domain_name, node), NEIGHBOURS))
