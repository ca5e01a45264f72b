"""Model references -> served models: directories, names in the models directory, hub ids. No torch.

References come from the operator (flags, files); what a client sends never becomes a path.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from aegaeon.config import KvDtype, ModelSettings, Settings
from aegaeon.errors import AegaeonError, CheckpointError, ConfigError, ModelNotFound
from aegaeon.memory.workspace import pass_bytes, sequence_bytes
from aegaeon.models.checkpoint import plan_load
from aegaeon.models.hub_ids import HUB_ID, NAME, directory_name
from aegaeon.models.packing import plan_pack
from aegaeon.models.token_ids import OwnIds
from aegaeon.specs import check_room
from aegaeon.types import ModelSpec, Quantize

MAX_NAME_CHARS = 200
# Of an element of keys and values.
KV_BYTES: dict[KvDtype, int] = {"auto": 4, "float32": 4, "bfloat16": 2, "float16": 2}


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A directory of the models directory. A damaged one has an `error` and no numbers."""

    id: str
    path: str
    disk_bytes: int
    architecture: str | None = None
    parameters: int | None = None
    context_tokens: int | None = None
    error: str | None = None


def served_models(settings: Settings) -> tuple[ModelSpec, ...]:
    """Resolve the models that `settings` name, as they are served.

    Raises ConfigError when they name none, and what `resolve_all` raises.
    """
    if not settings.models:
        raise ConfigError(
            "no models to serve; set AEGAEON_MODELS, `models` in the configuration file or "
            "--models A,B,C (`aegaeon models list` shows what is here)"
        )
    return resolve_all(settings.models, settings.models_dir, settings.kv_dtype, settings.quantize)


def resolve_all(
    references: Iterable[str | ModelSettings],
    models_dir: str | Path,
    kv_dtype: KvDtype = "auto",
    quantize: Quantize = "none",
) -> tuple[ModelSpec, ...]:
    """Resolve each reference, in order.

    Raises ConfigError if two would be served under one name, or if they are too many, and what
    `resolve` raises.
    """
    specs: list[ModelSpec] = []
    own_ids = OwnIds()
    for reference in references:
        one = reference if isinstance(reference, ModelSettings) else None
        spec = resolve(reference_of(one) if one else str(reference), models_dir, kv_dtype, quantize)
        own_ids.check(Path(spec.path), spec.vocab_tokens)
        specs.append(with_settings(spec, one) if one else spec)
        check_names(specs)
        check_room(specs)
    return tuple(specs)


def reference_of(one: ModelSettings) -> str:
    """Return the reference of a model with settings of its own, as `resolve` reads it."""
    return f"{one.id}={one.reference}" if one.id else one.reference


def with_settings(spec: ModelSpec, one: ModelSettings) -> ModelSpec:
    """Return `spec` with settings of its own."""
    return msgspec.structs.replace(
        spec,
        aliases=one.aliases,
        slo_ttft_s=one.slo_ttft_s,
        slo_tbt_s=one.slo_tbt_s,
        is_pinned=one.pinned,
        priority=one.priority,
        idle_s=one.idle_s,
        labels=one.labels,
        replicas=one.replicas,
    )


def check_names(specs: Sequence[ModelSpec]) -> None:
    """Raise ConfigError if two of `specs` would be served under one name."""
    known: dict[str, ModelSpec] = {}
    for spec in specs:
        for name in spec.names:
            if not name.isprintable() or not 0 < len(name) <= MAX_NAME_CHARS:
                raise ConfigError(
                    f"a model cannot be called {name[:MAX_NAME_CHARS]!r}; take 1 to "
                    f"{MAX_NAME_CHARS} printable characters"
                )
            if name in known:
                raise ConfigError(
                    f"{known[name].path} and {spec.path} would both be served as {name!r}; "
                    f"give one of them another name: NAME={spec.path}"
                )
            known[name] = spec


def resolve(
    reference: str,
    models_dir: str | Path,
    kv_dtype: KvDtype = "auto",
    quantize: Quantize = "none",
) -> ModelSpec:
    """Find the model that `reference` means, check its files, and say what it costs with keys and
    values of `kv_dtype` and weights as `quantize` makes them.

    A reference is a directory, a name in `models_dir` (`Qwen/Qwen3-0.6B` or `Qwen__Qwen3-0.6B`), a
    hub id, which is then downloaded into `models_dir`, or `name=` before any of these for the id
    it is served under. Headers are read and checked, weights are not.
    Raises ModelNotFound, CheckpointError, UnsupportedModel, ConfigError.
    """
    served_id, target = split_reference(reference)
    path = locate(target, models_dir)
    if path is None:
        if not HUB_ID.fullmatch(target):
            raise ModelNotFound(
                f"no model {target!r}: it is no directory, not in {models_dir}, and not a hub id "
                "(Org/Name); see `aegaeon models list`"
            )
        # Imported here because the hub's library takes a fifth of a second, in each process.
        from aegaeon.models.hub import pull  # noqa: PLC0415

        path = pull(target, models_dir)
    return describe_model(path, served_id, kv_dtype, quantize)


def split_reference(reference: str) -> tuple[str | None, str]:
    """Split `name=reference` into (name or None, reference). Raises ConfigError."""
    reference = reference.strip()
    if "=" not in reference or _is_model_directory(Path(reference).expanduser()):
        name, target = None, reference
    else:
        name, _, target = (part.strip() for part in reference.partition("="))
    if name == "" or not target:
        raise ConfigError(f"model reference {reference!r} must be NAME=REFERENCE or REFERENCE")
    return name, target


def locate(target: str, models_dir: str | Path) -> Path | None:
    """Return the directory that `target` means on this machine, or None. Downloads nothing."""
    try:
        path = Path(target).expanduser()
        if _is_model_directory(path) or (path.is_absolute() and path.is_dir()):
            return path
        if not NAME.fullmatch(target):
            return path if path.is_dir() else None
        named = Path(models_dir).expanduser() / directory_name(target)
        return named if named.is_dir() else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, or the home of nobody
        return None


def describe_model(
    path: Path,
    served_id: str | None = None,
    kv_dtype: KvDtype = "auto",
    quantize: Quantize = "none",
) -> ModelSpec:
    """Check the model in `path` and return its costs; its id is `served_id` or its directory's name
    with `__` as `/`. Weights take the bytes of the packed model, as `quantize` makes it.

    Raises ModelNotFound, CheckpointError, UnsupportedModel.
    """
    plan = plan_load(path)
    if not (path / "tokenizer.json").is_file():  # read by the proxy alone, and only when asked
        raise CheckpointError(f"{path} has no tokenizer.json; fetch or import the model again")
    config = plan.config
    return ModelSpec(
        id=served_id or id_of_directory(path),
        path=os.path.abspath(path),  # noqa: PTH100  # resolve() would follow links
        architecture=config.architecture,
        weight_bytes=plan_pack(plan, quantize).total_bytes,
        kv_token_bytes=2 * config.layers * config.kv_heads * config.head_dim * KV_BYTES[kv_dtype],
        context_tokens=config.context_tokens,
        vocab_tokens=config.vocab_tokens,
        pass_bytes=pass_bytes(config),
        sequence_bytes=sequence_bytes(config),
        quantize=quantize,
        config=msgspec.json.encode(config).decode(),
        tokenizer_bytes=_size_of(path / "tokenizer.json"),
    )


def id_of_directory(path: Path) -> str:
    """Return the id of the model in the directory `path`: `Qwen__Qwen3-0.6B` -> Qwen/Qwen3-0.6B."""
    name = os.path.basename(os.path.abspath(path))  # noqa: PTH100, PTH119  # as above
    return name.replace("__", "/", 1)


def list_models(models_dir: str | Path) -> tuple[ModelEntry, ...]:
    """Return an entry per directory of `models_dir`, by id; empty if there is no such directory.

    A damaged model is an entry with its error: listing never fails on one.
    """
    root = Path(models_dir).expanduser()
    if not root.is_dir():
        return ()
    directories = (
        path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    return tuple(sorted((_entry(path) for path in directories), key=lambda entry: entry.id))


def _entry(path: Path) -> ModelEntry:
    model_id, disk_bytes = id_of_directory(path), _disk_bytes(path)
    try:
        plan = plan_load(path)
    except AegaeonError as error:
        return ModelEntry(id=model_id, path=str(path), disk_bytes=disk_bytes, error=str(error))
    return ModelEntry(
        id=model_id,
        path=str(path),
        disk_bytes=disk_bytes,
        architecture=plan.config.architecture,
        parameters=plan.parameters,
        context_tokens=plan.config.context_tokens,
    )


def _disk_bytes(path: Path) -> int:
    total = 0
    for parent, _, files in os.walk(path):
        for file in files:
            try:
                total += (Path(parent) / file).stat().st_size
            except OSError:  # a dangling link counts nothing
                continue
    return total


def _size_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # gone since; who reads it says so
        return 0


def _is_model_directory(path: Path) -> bool:
    return (path / "config.json").is_file()
