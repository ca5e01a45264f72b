"""Where the memory that a node's engines share has its names."""

import msgspec


class Regions(msgspec.Struct, frozen=True):
    """Paths of the weight cache and the KV pool; data files lie beside them under longer names."""

    weights: str
    kv: str
