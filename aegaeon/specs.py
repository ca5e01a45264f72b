"""The models that are served: where their files are, what they cost, what is promised of them.

Only data, frozen; it stands beside types.py, whose names these are, too, and config.py.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from aegaeon.errors import ConfigError
from aegaeon.placements import Placement

Quantize = Literal["none", "int8"]  # what matrices become on their way into memory
Priority = Literal["low", "normal", "high"]
PRIORITIES: tuple[Priority, ...] = ("low", "normal", "high")  # who comes last first
# What an instance may say of itself in the table: the names of its models once; where each stands,
# how many ask for it and how fast it is; and the rest, with why some models were refused.
ROW_BYTES = 128 << 10
_OF_A_MODEL_BYTES = 48
REFUSALS_BYTES = 16 << 10
_OF_AN_INSTANCE_BYTES = REFUSALS_BYTES + (4 << 10)


def doc(text: str, **bounds: Any) -> Meta:
    """Return what documents a setting, and bounds it."""
    return Meta(description=text, **bounds)


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model with settings of its own, a table of the file."""

    reference: Annotated[str, doc("a directory, a name in models_dir, or a hub id", min_length=1)]
    id: Annotated[str, doc("what clients ask for (default: from the reference)")] = ""
    aliases: Annotated[tuple[str, ...], doc("other names for it")] = ()
    slo_ttft_s: Annotated[
        float, doc("its own time to a first token (0: as for all)", ge=0, le=1e6)
    ] = 0.0
    slo_tbt_s: Annotated[
        float, doc("its own time from token to token (0: as for all)", ge=0, le=1e6)
    ] = 0.0
    pinned: Annotated[bool, doc("loaded at start, and making room for no other")] = False
    priority: Annotated[
        Priority,
        doc("who comes first where a device, or the room to wait, is not enough for all"),
    ] = "normal"
    idle_s: Annotated[
        float,
        doc(
            "not asked for so long, it leaves devices and cache to others (0: never)", ge=0, le=1e6
        ),
    ] = 0.0
    labels: Annotated[
        dict[str, str], doc("labels that a cluster's node must have to serve it (default: none)")
    ] = {}
    replicas: Annotated[
        int,
        doc("nodes of a cluster that serve it at least (0: as for all)", ge=0, le=10_000),
    ] = 0


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A served model: where its files are and what it costs. `id` is what clients ask for. A `path`
    that is a name alone is one in the models directory of each node of a cluster (models/here.py).
    `config` is its ModelConfig as JSON: with it and the numbers plans who has no file of it yet.

    `weight_bytes` are those on the device, as `quantize` makes them, `kv_token_bytes` those of a
    token's KV. A pass holds up to `pass_bytes`, and `sequence_bytes` for each sequence in it. Its
    times are promised in place of the server's (0: those hold). A pinned one is loaded at start
    and makes room for no other; one that drains takes no new requests, and goes when it has none.
    Those of a higher `priority` come first where a device cannot do all. One that nobody has asked
    for `idle_s` leaves devices and the node's cache (0: it waits for others to need the room). In a
    cluster it lives on nodes with its `labels`, at least so many `replicas` (0: as for all).
    """

    id: str
    path: str
    architecture: str
    weight_bytes: int
    kv_token_bytes: int
    context_tokens: int
    vocab_tokens: int
    pass_bytes: int = 0
    sequence_bytes: int = 0
    quantize: Quantize = "none"
    config: str = ""
    tokenizer_bytes: int = 0
    aliases: tuple[str, ...] = ()
    slo_ttft_s: float = 0.0
    slo_tbt_s: float = 0.0
    is_pinned: bool = False
    is_draining: bool = False
    priority: Priority = "normal"
    idle_s: float = 0.0
    labels: dict[str, str] = {}
    replicas: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """All that clients may call it."""
        return (self.id, *self.aliases)


def check_room(specs: Sequence[ModelSpec]) -> None:
    """Raise ConfigError where instances could not tell of so many models."""
    names = sum(len(spec.id.encode()) for spec in specs)
    need = names + _OF_A_MODEL_BYTES * len(specs) + _OF_AN_INSTANCE_BYTES
    if need > ROW_BYTES:
        raise ConfigError(
            f"{len(specs)} models with {names} bytes of ids are too many for a server: instances "
            f"would need {need} bytes to tell of them, and have {ROW_BYTES}; serve fewer, give "
            "them shorter ids, or run a second server"
        )


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """What may change while a server serves; the settings of the same names."""

    max_body_bytes: int
    max_open: int
    max_open_mb: float
    request_timeout_s: float
    max_waiting: int
    max_running: int
    slo_ttft_s: float
    slo_tbt_s: float
    log_level: str


class Catalog(msgspec.Struct, frozen=True, kw_only=True):
    """What a domain serves now; each change has a higher `version`. `bounds` None: as the settings
    say. `complaint` is what was wrong with the last change of the configuration, if anything.
    `placement` says which nodes of a cluster serve what (None: all serve all)."""

    version: int = 0
    models: tuple[ModelSpec, ...] = ()
    bounds: Bounds | None = None
    complaint: str = ""
    placement: Placement | None = None

    def on(self, node: str) -> tuple[ModelSpec, ...]:
        """Return the models that `node` is to serve; empty: a machine alone, which serves all."""
        placed = self.placement
        if placed is None or not node:
            return self.models
        return tuple(s for s in self.models if placed.is_home(s.id, node, is_open=not s.labels))

    def find(self, name: str) -> ModelSpec | None:
        """Return the model with this id or alias."""
        return next((spec for spec in self.models if name in spec.names), None)

    def by_name(self) -> dict[str, ModelSpec]:
        """Return the models by all their names."""
        return {name: spec for spec in self.models for name in spec.names}

    def with_model(self, spec: ModelSpec) -> "Catalog":
        """Return it with `spec` in the place of the one with its id, or behind the others."""
        models = tuple(spec if known.id == spec.id else known for known in self.models)
        if spec not in models:
            models = (*models, spec)
        return msgspec.structs.replace(self, models=models)

    def without_model(self, model: str) -> "Catalog":
        """Return it without the model with this id."""
        models = tuple(known for known in self.models if known.id != model)
        return msgspec.structs.replace(self, models=models)
