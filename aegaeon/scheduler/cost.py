"""What actions take: linear models per model of the time of prefill, decode, copies and switches.

The forms are DistServe's (OSDI'24, appendix A); coefficients are fitted on the device that runs.
Live policies and the simulator read the same file.
"""

from typing import Annotated, NamedTuple

import msgspec

from aegaeon.config import Activations, StoredKv
from aegaeon.errors import ConfigError
from aegaeon.types import ModelId, Quantize

NonNegative = Annotated[float, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]


class Types(NamedTuple):
    """What weights, keys and values, and activations that meet weights of bfloat16 are made."""

    quantize: Quantize | None
    kv_dtype: StoredKv | None
    activations: Activations | None  # None: whatever they are, there are no weights of bfloat16


class ModelCost(msgspec.Struct, frozen=True):
    """Sizes and times of one model on one device. Gigabytes are 1e9 bytes, times seconds.

    `prefill` (a, b, c): a * tokens + b * sum of squared lengths + c. `decode` (a, b, c): a *
    context tokens of the batch + b * requests + c. A fit may have a negative slope: a prefill never
    takes less than its constant, and decoding no less for more context. `max_len` bounds prompt
    and answer together. Loads take `load_factor` times what the link says. `quantize`,
    `kv_dtype` and `activations` are the types that the times are of (None: nobody says).
    """

    weight_gb: Positive
    kv_gb_per_token: NonNegative
    max_len: Annotated[int, msgspec.Meta(ge=2)]
    prefill: tuple[float, float, Positive]
    decode: tuple[float, float, Positive]
    load_factor: Positive = 1.0
    quantize: Quantize | None = None
    kv_dtype: StoredKv | None = None
    activations: Activations = "float32"  # as everywhere before there was a choice

    def prefill_s(self, tokens: int, squares: int | None = None) -> float:
        """Return the time of a prefill of `tokens`, in one prompt unless `squares` says how the
        lengths of several, squared, sum up."""
        per_token, per_square, fixed = self.prefill
        squared = tokens * tokens if squares is None else squares
        return max(per_token * tokens + per_square * squared + fixed, fixed)

    def decode_s(self, context_tokens: int, requests: int) -> float:
        """Return the time of a step that makes a token for each of `requests`."""
        per_token, per_request, fixed = self.decode
        if per_token > 0.0:
            fixed += per_token * context_tokens
        return fixed + per_request * requests if per_request > 0.0 else fixed

    @property
    def types(self) -> Types:
        """What the times are of."""
        return Types(self.quantize, self.kv_dtype, self.activations)

    def is_of(self, types: Types) -> bool:
        """Whether the times are those of such types, as far as they say."""
        pairs = zip(self.types, types, strict=True)
        return all(known is None or wanted in (None, known) for known, wanted in pairs)

    def kv_gb(self, tokens: int) -> float:
        """Return the size of the keys and values of `tokens`."""
        return self.kv_gb_per_token * tokens


class Costs(msgspec.Struct, frozen=True):
    """A device, its link to the host, and the kinds of models that run there.

    `model_mix` names a kind for the k-th model of a workload, in turn. A Switch by itself takes
    `switch_s`; `load_fixed_s` and `move_fixed_s` come to what a load, and a move of keys and values
    either way, take on the link. A device that computes in the host's memory moves no keys and
    values (`is_kv_moved`); its link is the way from the disk. A device that has computed nothing
    for `rest_s` begins with a model of which only the first layers are in; None: never.
    """

    link_gb_per_s: Positive
    device_memory_gb: Positive
    models: Annotated[dict[str, ModelCost], msgspec.Meta(min_length=1)]
    model_mix: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    switch_s: NonNegative = 0.005
    load_fixed_s: NonNegative = 0.0
    move_fixed_s: NonNegative = 0.0
    is_kv_moved: bool = True
    rest_s: NonNegative | None = None

    def kind(self, index: int) -> ModelCost:
        """Return what the model costs that is number `index`, from 0, to appear."""
        return self.models[self.model_mix[index % len(self.model_mix)]]

    def of(self, models: tuple[ModelId, ...]) -> dict[ModelId, ModelCost]:
        """Return the costs of `models`, in their order; those that have a kind's name are of it."""
        return {
            model: self.models.get(model) or self.kind(index) for index, model in enumerate(models)
        }

    def load_s(self, model: ModelCost) -> float:
        """Return the time in which the model's weights come over the link."""
        return model.load_factor * (model.weight_gb / self.link_gb_per_s + self.load_fixed_s)

    def move_s(self, model: ModelCost, tokens: int) -> float:
        """Return the time in which keys and values of `tokens` go over the link, either way."""
        if not self.is_kv_moved:
            return 0.0
        return model.kv_gb(tokens) / self.link_gb_per_s + self.move_fixed_s


def decode_costs(data: bytes, name: str) -> Costs:
    """Return the costs that JSON `data`, the content of `name`, says. Raises ConfigError."""
    try:
        costs = msgspec.json.decode(data, type=Costs)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} has no costs ({error}); make it with calibrate.py") from None
    for kind in costs.model_mix:
        if kind not in costs.models:
            raise ConfigError(f"{name}: model_mix names {kind!r}, which models does not have")
    for kind, model in costs.models.items():
        if model.weight_gb >= costs.device_memory_gb:
            raise ConfigError(
                f"{name}: {kind} has {model.weight_gb:g} GB of weights, the device "
                f"{costs.device_memory_gb:g} GB of memory; leave it out or give the device more"
            )
    return costs
