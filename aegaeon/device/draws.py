"""How a row's token is drawn, as native operators take it, on whichever device; and drawing on the
host, for devices that have no operators of their own for it."""

from collections.abc import Sequence

from torch import Tensor

from aegaeon import _native
from aegaeon.device.base import Change, Draw, RowLogProbs

SEED_MASK = (1 << 64) - 1

# Temperature, top_k, top_p, min_p, seed, position.
DrawOperand = tuple[float, int, float, float, int, int]


def draw_operands(draws: Sequence[Draw]) -> list[DrawOperand]:
    """Return `draws`, one for each row."""
    return [
        (params.temperature, max(params.top_k, 0), params.top_p, params.min_p,
         params.seed & SEED_MASK, position)
        for params, position in draws
    ]  # fmt: skip


def change_operands(
    changes: Sequence[Change | None],
) -> list[tuple[_native.Adjustment | None, int]]:
    """Return `changes`, one for each row; who calls keeps the masks."""
    if not any(changes):
        return []
    return [
        (None, 0)
        if change is None
        else (change.adjustment, 0 if change.allowed is None else change.allowed.data_ptr())
        for change in changes
    ]


def sample_on_host(
    pool: _native.ThreadPool,
    logits: Tensor,
    draws: Sequence[Draw],
    changes: Sequence[Change | None] = (),
) -> list[int | None]:
    """As Device.sample, of logits in the host's memory."""
    logits = logits.contiguous()
    shape = (logits.shape[0], logits.shape[1])
    operands = draw_operands(draws), change_operands(changes)
    return _native.sample(pool, logits.data_ptr(), shape, *operands)


def log_probabilities_on_host(
    pool: _native.ThreadPool, logits: Tensor, chosen: Sequence[int], best: int
) -> list[RowLogProbs]:
    """As Device.log_probabilities, of logits in the host's memory."""
    logits = logits.contiguous()
    shape = (logits.shape[0], logits.shape[1])
    return _native.log_probabilities(pool, logits.data_ptr(), shape, chosen, best)
