"""What an engine holds its models' weights and its sequences' keys and values by."""

from dataclasses import dataclass

from aegaeon.engine.kv_place import KvPlace
from aegaeon.engine.shelf import Shelf
from aegaeon.memory.costs import SwapCosts
from aegaeon.memory.evictions import EvictionLog
from aegaeon.memory.traffic import Traffic
from aegaeon.memory.weights import Weights


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Where an engine's bytes are, and what their moves have come to."""

    weights: Weights
    kv: KvPlace
    traffic: Traffic
    costs: SwapCosts
    shelf: Shelf | None = None
    evictions: EvictionLog | None = None  # of the node's cache, where weights come from one
