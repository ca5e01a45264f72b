"""What a supervisor holds of its domain: by what right, which processes, and in what layout.

Alone on its machine it holds the whole of it; as a part of a cluster, a share (aegaeon/cluster).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import msgspec

from aegaeon.child import Child
from aegaeon.config import Settings
from aegaeon.keeper import CatalogKeeper, KvSizes, bounds_of, kv_sizes, model_directories
from aegaeon.memory.machine import Machine, read_machine, with_device
from aegaeon.memory.room import settle
from aegaeon.specs import Catalog
from aegaeon.store.base import Domain
from aegaeon.store.domains import DomainClaim, claim_domain
from aegaeon.types import ModelSpec


class Keeper(Protocol):
    """What a supervisor knows of the catalogue by. Owned by its thread."""

    def current(self) -> Catalog:
        """Return the catalogue, as last seen where the store does not answer."""

    def tend(self, now: float) -> None:
        """Do what is to be done about it now; called often."""


class Layout(msgspec.Struct, frozen=True):
    """What all processes that share a machine's memory have to agree in: the settings, with the
    bytes chosen, and what its KV pool is cut for, whatever is served when they restart."""

    settings: Settings
    kv_shapes: tuple[KvSizes, ...] = ()
    kv_spare: tuple[KvSizes, ...] = ()


class Holding(ABC):
    """From `take` to `release`. `node` is the machine's name among those that share the store,
    `address` where others reach it, `proxy` the name of a proxy."""

    node = ""
    address = ""
    proxy = "proxy"

    @abstractmethod
    def instances(self, settings: Settings) -> list[Child]:
        """Return the instances that are the supervisor's to keep."""

    @abstractmethod
    def take(self, settings: Settings, specs: Sequence[ModelSpec]) -> Layout:
        """Take hold of it. Raises ConfigError, BudgetTooSmall, StoreUnavailable, DeviceError."""

    @abstractmethod
    def keeper(self, domain: Domain, settings: Settings, specs: tuple[ModelSpec, ...]) -> Keeper:
        """Return by what the catalogue is known. Raises StoreUnavailable, RegionError."""

    @abstractmethod
    def release(self) -> None:
        """Let go; what nobody else holds is removed. Idempotent."""


class WholeDomain(Holding):
    """The domain with all its instances, which nobody else has on this machine."""

    def __init__(self) -> None:
        self._claim: DomainClaim | None = None

    def instances(self, settings: Settings) -> list[Child]:
        """See Holding."""
        return [Child(f"instance-{index}", index) for index in range(settings.instance_count)]

    def take(self, settings: Settings, specs: Sequence[ModelSpec]) -> Layout:
        """See Holding. The domain starts empty."""
        self._claim = claim_domain(settings)
        # Only now is the memory free again that servers which died had filled.
        return lay_out_node(settings, specs, with_device(read_machine(), settings))

    def keeper(self, domain: Domain, settings: Settings, specs: tuple[ModelSpec, ...]) -> Keeper:
        """See Holding. The catalogue begins with `specs`."""
        first = Catalog(models=specs, bounds=bounds_of(settings))
        return CatalogKeeper(domain.catalog(), domain.metadata(), domain.board(), first)

    def release(self) -> None:
        """See Holding."""
        claim, self._claim = self._claim, None
        if claim is not None:
            claim.release()


def lay_out_node(settings: Settings, specs: Sequence[ModelSpec], machine: Machine) -> Layout:
    """Return the layout of `machine` for as many instances as the settings say.

    Raises BudgetTooSmall when it does not fit the models or the machine.
    """
    settled = settle(settings, specs, machine)
    if settings.device == "null":
        return Layout(settled)
    return Layout(
        settled,
        kv_sizes(specs),
        kv_sizes(model_directories(settings.models_dir)),
    )
