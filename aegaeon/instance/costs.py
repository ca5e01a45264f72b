"""What actions take on this device, for the policy: from the settings' file, else guessed."""

import logging
from pathlib import Path

import msgspec

from aegaeon.config import Settings
from aegaeon.errors import ConfigError
from aegaeon.measures import Speed
from aegaeon.scheduler.cost import Costs, ModelCost, Types, decode_costs
from aegaeon.scheduler.refine import guessed_cost
from aegaeon.types import ModelId, ModelSpec

log = logging.getLogger(__name__)

LINK_GB_PER_S = 2.0  # guessed
SPEED_TOKENS = 512  # of the prompt by which a model's speed is told
SAME_SIZE = 1e-3  # weights that differ by no more of theirs are of copies of one model


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
    models = {}
    names = set()
    for spec in specs:
        guess = guessed_cost(
            spec.weight_bytes / 1e9, spec.kv_token_bytes / 1e9, max(2, spec.context_tokens)
        )
        activations = None if spec.quantize == "int8" else settings.activations
        types = Types(spec.quantize, settings.stored_kv, activations)
        measured = None if known is None else _measured(known, spec, types)
        if measured is not None:
            names.add(spec.id)
            sizes = {name: getattr(guess, name) for name in ("weight_gb", "kv_gb_per_token")}
            measured = msgspec.structs.replace(measured, max_len=guess.max_len, **sizes)
        models[spec.id] = measured or guess
    if known is not None:
        costs = msgspec.structs.replace(known, models=models, model_mix=tuple(models))
    else:
        costs = Costs(
            link_gb_per_s=settings.link_gb_per_s or LINK_GB_PER_S,
            device_memory_gb=budget_bytes / 1e9,
            models=models,
            model_mix=tuple(models),
        )
    return costs, frozenset(names)


def speed_of(costs: Costs, model: ModelCost) -> Speed:
    """Return what others are told of how fast `model` is, to two digits: finer changes are not
    worth telling."""
    token_s = model.prefill_s(SPEED_TOKENS) / SPEED_TOKENS
    return Speed(float(f"{token_s:.2g}"), float(f"{costs.load_s(model):.2g}"))


def _measured(known: Costs, spec: ModelSpec, types: Types) -> ModelCost | None:
    """What is known of the model of `spec`: under its name, or of another as large."""
    named = known.models.get(spec.id)
    if named is not None:
        if named.is_of(types):
            return named
        log.warning(
            "costs are guessed, those of the file are of %s, not %s; calibrate with these model=%s",
            *(_told(named.types), _told(types), spec.id),
        )
        return None
    alike = (
        cost
        for cost in known.models.values()
        if abs(cost.weight_gb * 1e9 - spec.weight_bytes) <= SAME_SIZE * spec.weight_bytes
        and cost.is_of(types)
    )
    return next(alike, None)


def _told(types: Types) -> str:
    return " ".join(f"{name}={value}" for name, value in types._asdict().items())


def _read(path: Path) -> Costs:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the costs {path}: {error}; see --costs-file") from None
    return decode_costs(data, str(path))
