"""What actions take on this device, for the policy: from the settings' file, else guessed."""

import logging
from pathlib import Path

from aegaeon.config import Settings
from aegaeon.errors import ConfigError
from aegaeon.measures import Speed
from aegaeon.scheduler.cost import Costs, ModelCost, Types, decode_costs
from aegaeon.scheduler.known_costs import known_costs
from aegaeon.types import ModelId, ModelSpec

log = logging.getLogger(__name__)

SPEED_TOKENS = 512  # of the prompt by which a model's speed is told


def costs_of(
    settings: Settings, specs: tuple[ModelSpec, ...], budget_bytes: int
) -> tuple[Costs, frozenset[ModelId]]:
    """Return the costs of the models of `specs` by their ids, and which of them were measured.

    Those that `settings.costs_file` does not know, by name or as a copy, are guessed, and so, with
    a warning, are those that it knows with weights, keys and values or activations of other types;
    sizes are always those of `specs`.
    Raises ConfigError.
    """
    known = _read(Path(settings.costs_file).expanduser()) if settings.costs_file else None
    found = known_costs(known, settings, specs, budget_bytes)
    for one in found.mismatches:
        log.warning(
            "costs are guessed, those of the file are of %s, not %s; calibrate with these model=%s",
            *(_told(one.measured), _told(one.wanted), one.model),
        )
    return found.costs, found.measured


def speed_of(costs: Costs, model: ModelCost) -> Speed:
    """Return what others are told of how fast `model` is, to two digits: finer changes are not
    worth telling."""
    token_s = model.prefill_s(SPEED_TOKENS) / SPEED_TOKENS
    return Speed(float(f"{token_s:.2g}"), float(f"{costs.load_s(model):.2g}"))


def _told(types: Types) -> str:
    return " ".join(f"{name}={value}" for name, value in types._asdict().items())


def _read(path: Path) -> Costs:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the costs {path}: {error}; see --costs-file") from None
    return decode_costs(data, str(path))
