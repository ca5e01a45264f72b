"""How a row's token is drawn, as native operators take it, on whichever device."""

from collections.abc import Sequence

from aegaeon.device.base import Draw

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
