"""What actions of the served models take, as far as a file of measurements knows, else guessed."""

from typing import NamedTuple

import msgspec

from aegaeon.config import Settings
from aegaeon.scheduler.cost import Costs, ModelCost, Types
from aegaeon.scheduler.refine import guessed_cost
from aegaeon.types import ModelId, ModelSpec

LINK_GB_PER_S = 2.0  # guessed
SAME_SIZE = 1e-3  # weights that differ by no more of theirs are of copies of one model


class Mismatch(NamedTuple):
    """A model that was measured with weights, keys and values or activations of other types."""

    model: ModelId
    measured: Types
    wanted: Types


class KnownCosts(NamedTuple):
    """The costs by the models' ids, those of them that were measured, and what did not fit."""

    costs: Costs
    measured: frozenset[ModelId]
    mismatches: tuple[Mismatch, ...]


def known_costs(
    known: Costs | None, settings: Settings, specs: tuple[ModelSpec, ...], budget_bytes: int
) -> KnownCosts:
    """Return the costs of the models of `specs` on a device of so many bytes.

    Those that `known` does not know, by name or as a copy, are guessed, and so are those that it
    knows with other types; sizes are always those of `specs`.
    """
    models: dict[ModelId, ModelCost] = {}
    names: set[ModelId] = set()
    mismatches: list[Mismatch] = []
    for spec in specs:
        guess = guessed_cost(
            spec.weight_bytes / 1e9, spec.kv_token_bytes / 1e9, max(2, spec.context_tokens)
        )
        activations = None if spec.quantize == "int8" else settings.activations
        types = Types(spec.quantize, settings.stored_kv, activations)
        measured = None if known is None else _measured(known, spec, types)
        if isinstance(measured, Mismatch):
            mismatches.append(measured)
            measured = None
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
    return KnownCosts(costs, frozenset(names), tuple(mismatches))


def _measured(known: Costs, spec: ModelSpec, types: Types) -> ModelCost | Mismatch | None:
    """What is known of the model of `spec`: under its name, or of another as large."""
    named = known.models.get(spec.id)
    if named is not None:
        return named if named.is_of(types) else Mismatch(spec.id, named.types, types)
    alike = (
        cost
        for cost in known.models.values()
        if abs(cost.weight_gb * 1e9 - spec.weight_bytes) <= SAME_SIZE * spec.weight_bytes
        and cost.is_of(types)
    )
    return next(alike, None)
