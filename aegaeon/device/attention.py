"""Where the rows of a pass put and find their keys and values, in the form native code takes."""

from aegaeon import _native
from aegaeon.device.packed import TYPE_CODES
from aegaeon.memory.kv import KvView


class AttentionPlan:
    """Everything about a pass that is the same in all its layers; made once per KvView."""

    def __init__(self, kv: KvView) -> None:
        self.kv = kv  # keeps the pages alive
        self.rows = paged_rows(kv)


def paged_rows(kv: KvView) -> _native.PagedRows:
    """Return the rows of a pass as native operators take them; `kv` keeps the pages."""
    shape = kv.shape
    return _native.PagedRows(
        (kv.pages.data_ptr(), len(kv.pages), TYPE_CODES[shape.dtype]),
        (shape.layers, shape.kv_heads, shape.head_dim),
        [(part.first_row, part.rows, part.start, part.blocks) for part in kv.sequences],
    )
