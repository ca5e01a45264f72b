"""Matrix products whose every row has the same bits whatever the other rows are.

Library products choose their kernel by the number of rows, and kernels differ in the order in
which they add. What a library guarantees nowhere is measured here, per weight shape, on the
machine that computes.
"""

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

Product = Callable[[Tensor, Tensor], Tensor]

TILES = (2, 4, 8, 16, 32)
# On packed weights 4 rows take less time than 2.
PACKED_TILES = TILES[1:]
FIXED_ROWS = 32
PROBE_MULTIPLES = (1, 2, 3, 5, 8, 16)
PROBE_ROWS = (64, 128, 512)
# Of one product of the probe; large weights are probed at fewer row counts.
PROBE_FLOPS = 2.5e9
HAS_ONEDNN = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class RowIndependentLinear:
    """x @ weight.T for x [rows, in] and weight [out, in], float32, packed or not.

    Rows are padded to a multiple of the smallest tile that passed the probe for this weight shape;
    where none passes, every call has exactly FIXED_ROWS rows, so that there is nothing to choose.
    The thread count must not change after the first product.
    """

    def __init__(self, product: Product | None = None) -> None:
        self._product = product or fastest_product()
        self._tiles: dict[tuple[torch.Size, bool], int] = {}

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        key = (weight.shape, weight.is_mkldnn)
        tile = self._tiles.get(key)
        if tile is None:
            tile = self._tiles[key] = self._probe(weight)
        rows = x.shape[0]
        missing = -rows % (tile or FIXED_ROWS)
        if missing:
            x = F.pad(x, (0, 0, 0, missing))
        if tile:
            return self._product(x, weight)[:rows]
        parts = [self._product(part, weight) for part in torch.split(x, FIXED_ROWS)]
        return torch.cat(parts)[:rows]

    def tile(self, weight: Tensor) -> int:
        """Return the row multiple in use for weights of this shape; 0: fixed-size calls."""
        return self._tiles[weight.shape, weight.is_mkldnn]

    def _probe(self, weight: Tensor) -> int:
        generator = torch.Generator().manual_seed(0)
        out_features, in_features = weight.shape
        affordable = int(PROBE_FLOPS / (2 * out_features * in_features))
        rows = min(max(affordable, 2 * TILES[-1]), PROBE_ROWS[-1] + TILES[-1])
        x = torch.randn(rows, in_features, generator=generator)
        for tile in PACKED_TILES if weight.is_mkldnn else TILES:
            if rows_are_independent(self._product, x, weight, tile):
                return tile
        log.warning("products depend on the row count, using fixed tiles: shape=%s", weight.shape)
        return 0


def rows_are_independent(product: Product, x: Tensor, weight: Tensor, tile: int) -> bool:
    """Tell whether multiples of `tile` rows of x give the rows that all of x gives."""
    rows = len(x) // tile * tile
    whole = product(x[:rows], weight)
    counts = {tile * multiple for multiple in PROBE_MULTIPLES} | set(PROBE_ROWS)
    for index, count in enumerate(sorted(counts)):
        if count > rows:
            break
        # From the front and from the back in turn: a row's place must not show either.
        first = (rows - count) * (index % 2)
        if not torch.equal(product(x[first : first + count], weight), whole[first : first + count]):
            return False
    return True


def fastest_product() -> Product:
    """Return oneDNN's product where torch has it: at few rows it moves weights 2-4x as fast."""
    return _onednn_product if HAS_ONEDNN else F.linear


def pack(weight: Tensor) -> Tensor:
    """Return `weight` [out, in] in the order oneDNN reads it, which halves products of few rows.

    The copy is opaque: nothing but the product can read it. Without oneDNN it is `weight` itself.
    """
    if not HAS_ONEDNN:
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def _onednn_product(x: Tensor, weight: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return result
