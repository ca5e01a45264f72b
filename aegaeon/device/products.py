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
FIXED_ROWS = 32
PROBE_MULTIPLES = (1, 2, 3, 5, 8, 16)
PROBE_ROWS = (64, 128, 512)
PROBE_FLOPS = 4e9


class RowIndependentLinear:
    """x @ weight.T for x [rows, in] and weight [out, in], float32.

    Rows are padded to a multiple of the smallest tile that passed the probe for this weight shape;
    where none passes, every call has exactly FIXED_ROWS rows, so that there is nothing to choose.
    The thread count must not change after the first product.
    """

    def __init__(self, product: Product | None = None) -> None:
        self._product = product or fastest_product()
        self._tiles: dict[tuple[int, ...], int] = {}

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        shape = tuple(weight.shape)
        tile = self._tiles.get(shape)
        if tile is None:
            tile = self._tiles[shape] = self._probe(weight)
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
        return self._tiles[tuple(weight.shape)]

    def _probe(self, weight: Tensor) -> int:
        generator = torch.Generator().manual_seed(0)
        out_features, in_features = weight.shape
        affordable = int(PROBE_FLOPS / (2 * out_features * in_features))
        rows = min(max(affordable, 3 * TILES[-1]), PROBE_ROWS[-1] + TILES[-1])
        x = torch.randn(rows, in_features, generator=generator)
        for tile in TILES:
            if rows_are_independent(self._product, x, weight, tile):
                return tile
        log.warning("products depend on the row count, using fixed tiles: shape=%s", weight.shape)
        return 0


def rows_are_independent(product: Product, x: Tensor, weight: Tensor, tile: int) -> bool:
    """Tell whether every multiple of `tile` rows of x gives the rows that all of x gives."""
    rows = len(x) // tile * tile
    whole = product(x[:rows], weight)
    counts = {tile * multiple for multiple in PROBE_MULTIPLES} | set(PROBE_ROWS)
    for count in sorted(counts):
        if count > rows:
            break
        if not torch.equal(product(x[:count], weight), whole[:count]):
            return False
        if not torch.equal(product(x[rows - count : rows], weight), whole[rows - count :]):
            return False
    return True


def fastest_product() -> Product:
    """Return oneDNN's product where torch has it: at few rows it moves weights 2-4x as fast."""
    if torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return _onednn_product
    return F.linear


def _onednn_product(x: Tensor, weight: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return result
