"""What actions take on this device, for the policy: from the settings' file, else guessed."""

import logging
from collections.abc import Sequence
from pathlib import Path

from aegaeon.config import Settings
from aegaeon.engine.base import Engine, NullEngine, Times
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


class CostedTimes(Times):
    """Times by measured costs; models that were not measured take none."""

    def __init__(self, costs: Costs, measured: frozenset[ModelId]) -> None:
        super().__init__()
        self._costs = costs
        self._models = {model: costs.models[model] for model in measured}

    def load_s(self, model: ModelId) -> float:
        """See Times."""
        cost = self._models.get(model)
        return 0.0 if cost is None else self._costs.load_s(cost)

    def prefill_s(self, model: ModelId, spans: Sequence[tuple[int, int]]) -> float:
        """See Times."""
        cost = self._models.get(model)
        tokens = sum(stop - start for start, stop in spans)
        squares = sum(stop * stop - start * start for start, stop in spans)
        return 0.0 if cost is None else cost.prefill_s(tokens, squares)

    def decode_s(self, model: ModelId, context_tokens: int, requests: int) -> float:
        """See Times."""
        cost = self._models.get(model)
        return 0.0 if cost is None else cost.decode_s(context_tokens, requests)


def paced(engine: Engine, settings: Settings, specs: tuple[ModelSpec, ...]) -> Engine:
    """Return `engine`; one without a model takes as long as `settings.costs_file` says, if it says:
    then what stands around it is tried at the pace of a device that is not there. Raises
    ConfigError."""
    if isinstance(engine, NullEngine) and settings.costs_file:
        engine.keep_to(CostedTimes(*costs_of(settings, specs, 0)))
    return engine


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
