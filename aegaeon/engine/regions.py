"""Where the memory that a node's engines share has its names."""

import msgspec

KvSizes = tuple[int, int, int]  # layers, heads of keys and values, head_dim


class Regions(msgspec.Struct, frozen=True):
    """Paths of the weight cache and the KV pool; data files lie beside them under longer names.

    Those who share the node's processors meet at `neighbours` (empty: they share none), each at a
    `seat` of its own.

    The pool is cut for the models that keep `kv_shapes` (none: for those of who opens it), and may
    hold what models keep that come later, `kv_spare`, where a block of it fits.
    """

    weights: str
    kv: str
    kv_shapes: tuple[KvSizes, ...] = ()
    kv_spare: tuple[KvSizes, ...] = ()
    neighbours: str = ""
    seat: int = 0
