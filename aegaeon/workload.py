"""Which model each request of a load asks for, and what it says. Pure and seeded."""

import random
from collections.abc import Sequence
from typing import Literal

from aegaeon.errors import ConfigError
from aegaeon.types import ModelId

MixPolicy = Literal["round_robin", "grouped", "random"]

_WORDS = (
    *("device", "model", "token", "weights", "keys", "line", "reader", "promise", "turn", "stage"),
    *("passes", "waits", "comes", "goes", "stays", "reads", "a", "the", "of", "between", "while"),
)


def mix_models(
    models: Sequence[ModelId], count: int, policy: MixPolicy, group_size: int = 1, seed: int = 0
) -> tuple[ModelId, ...]:
    """Return the model of each of `count` requests, in order of arrival.

    round_robin changes the model with every request, grouped after `group_size` of them, random
    draws each by `seed`. Raises ConfigError without models or with a group of none.
    """
    if not models:
        raise ConfigError("a load needs at least one model; give --models")
    if group_size < 1:
        raise ConfigError(f"a group holds at least one request, not {group_size}; see --group-size")
    match policy:
        case "round_robin":
            return tuple(models[index % len(models)] for index in range(count))
        case "grouped":
            return tuple(models[index // group_size % len(models)] for index in range(count))
        case "random":
            draw = random.Random(seed)
            return tuple(draw.choice(models) for _ in range(count))


def make_prompt(chars: int, seed: int) -> str:
    """Return `chars` characters of words drawn by `seed`; other seeds begin differently."""
    draw = random.Random(seed)
    text = f"{seed}:"
    while len(text) < chars:
        text += " " + draw.choice(_WORDS)
    return text[:chars]
