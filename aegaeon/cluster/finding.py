"""Which models a cluster is to serve, wherever their files are: here, on shared file systems, on
any of its nodes, or on the hub. Said before anything is started.
"""

import logging
from collections.abc import Sequence
from typing import Any

import msgspec

from aegaeon.cluster.plan import models_dir_of
from aegaeon.config import KvDtype, ModelSettings, Settings
from aegaeon.errors import AegaeonError, ConfigError, ModelNotFound
from aegaeon.models.here import for_all_nodes, stored_name
from aegaeon.models.hub_ids import HUB_ID
from aegaeon.models.references import (
    check_names,
    describe_model,
    locate,
    reference_of,
    resolve,
    split_reference,
    with_settings,
)
from aegaeon.models.token_ids import OwnIds
from aegaeon.nodes import NodeNow, WeightsSettings
from aegaeon.specs import check_room
from aegaeon.types import ModelSpec, Quantize

log = logging.getLogger(__name__)

ASK_S = 60.0  # for nodes to look; one that has none of our packages installs them first


class Asked(msgspec.Struct, frozen=True):
    """What a node is asked for: models by reference, in its directory."""

    references: tuple[str, ...]
    models_dir: str
    kv_dtype: KvDtype
    quantize: Quantize


class Found(msgspec.Struct, frozen=True):
    """What a node has of what it was asked for, by reference, and what is wrong with others."""

    specs: dict[str, ModelSpec]
    wrong: dict[str, str]


def look_here(told: bytes) -> bytes:
    """Answer Asked with Found: what this node has. Runs on each node, as a task of Ray."""
    asked = msgspec.json.decode(told, type=Asked)
    specs, wrong = {}, {}
    for reference in asked.references:
        try:
            found = _described(reference, asked)
        except AegaeonError as error:
            wrong[reference] = str(error)
        else:
            if found is not None:
                specs[reference] = found
    return msgspec.json.encode(Found(specs, wrong))


def find_models(
    ray: Any, settings: Settings, nodes: Sequence[NodeNow], own: str
) -> tuple[ModelSpec, ...]:
    """Return what `settings` name as all `nodes` are told of it; `own` is the node where we are.

    Raises ConfigError, ModelNotFound with where it was looked for, CheckpointError,
    UnsupportedModel.
    """
    if not settings.models:
        raise ConfigError(
            "no models to serve; set AEGAEON_MODELS, `models` in the configuration file or "
            "--models A,B,C (`aegaeon models list` shows what is here)"
        )
    here = next((models_dir_of(settings, node) for node in nodes if node.id == own), "")
    here = here or settings.models_dir
    one_by_one = [_reference(one) for one in settings.models]
    specs, missing = _look(one_by_one, [here, *_ways(settings).shared], settings)
    if missing:
        others = [node for node in nodes if node.id != own]
        specs |= _ask(ray, settings, others, missing)
    found = []
    for one, reference in zip(settings.models, one_by_one, strict=True):
        spec = specs.get(reference) or _from_hub(reference, settings, here, len(nodes))
        found.append(with_settings(spec, one) if isinstance(one, ModelSettings) else spec)
    _check(found)
    return tuple(found)


def _look(
    references: Sequence[str], directories: Sequence[str], settings: Settings
) -> tuple[dict[str, ModelSpec], tuple[str, ...]]:
    """Return what is in any of `directories`, and the references of what is in none."""
    specs: dict[str, ModelSpec] = {}
    for directory in directories:
        asked = Asked((), directory, settings.kv_dtype, settings.quantize)
        for reference in references:
            if reference not in specs and (spec := _described(reference, asked)) is not None:
                specs[reference] = spec
    return specs, tuple(reference for reference in references if reference not in specs)


def _described(reference: str, asked: Asked) -> ModelSpec | None:
    """Return what is here, None where it is not. Raises ConfigError, CheckpointError,
    UnsupportedModel."""
    name, target = split_reference(reference)
    path = locate(target, asked.models_dir)
    if path is None:
        return None
    spec = describe_model(path, name, asked.kv_dtype, asked.quantize)
    OwnIds().check(path, spec.vocab_tokens)
    return for_all_nodes(spec, asked.models_dir)


def _ask(
    ray: Any, settings: Settings, nodes: Sequence[NodeNow], references: tuple[str, ...]
) -> dict[str, ModelSpec]:
    """Ask `nodes`, all at once; who does not answer in time has nothing."""
    affinity = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    task = ray.remote(look_here)
    asked = {}
    for node in nodes:
        models_dir = models_dir_of(settings, node)
        told = Asked(references, models_dir, settings.kv_dtype, settings.quantize)
        where = {
            "num_cpus": 0,
            "max_retries": 0,
            "scheduling_strategy": affinity(node.id, soft=False),
        }
        asked[task.options(**where).remote(msgspec.json.encode(told))] = node
    if not asked:
        return {}
    answered, late = ray.wait(list(asked), num_returns=len(asked), timeout=ASK_S)
    for one in late:
        log.warning("node does not say which models it has node=%s", asked[one].id[:8])
        ray.cancel(one, force=True)
    specs: dict[str, ModelSpec] = {}
    for one in answered:
        node = asked[one]
        try:
            found = msgspec.json.decode(ray.get(one), type=Found)
        except ray.exceptions.RayError as error:
            log.warning("node not asked node=%s error=%s", node.id[:8], str(error).splitlines()[0])
            continue
        for why in found.wrong.values():
            log.warning("model of a node not usable node=%s error=%s", node.id[:8], why)
        for reference, spec in found.specs.items():
            log.info("model found model=%s node=%s", spec.id, node.id[:8])
            specs.setdefault(reference, spec)
    return specs


def _from_hub(reference: str, settings: Settings, models_dir: str, nodes: int) -> ModelSpec:
    """Download to here what is nowhere else; other nodes get it from here."""
    _, target = split_reference(reference)
    ways = _ways(settings)
    if "hub" not in ways.order or not HUB_ID.fullmatch(target):
        places = [models_dir, *ways.shared, f"{nodes} nodes of the cluster"]
        hub = (
            "the hub is not to be asked"
            if HUB_ID.fullmatch(target)
            else "it is no hub id (Org/Name)"
        )
        raise ModelNotFound(
            f"no model {target!r} is anywhere: not in {', nor in '.join(places[:-1])}, nor on any "
            f"of {places[-1]}, and {hub}; see `aegaeon models list` on each, or name a shared "
            "directory: [cluster.weights] shared"
        )
    spec = resolve(reference, models_dir, settings.kv_dtype, settings.quantize)
    return for_all_nodes(spec, models_dir)


def _check(specs: Sequence[ModelSpec]) -> None:
    """Raise ConfigError where two have one name, for clients or among nodes."""
    check_names(specs)
    check_room(specs)
    places: dict[str, ModelSpec] = {}
    for spec in specs:
        other = places.setdefault(stored_name(spec), spec)
        if other.path != spec.path:
            raise ConfigError(
                f"{other.path} and {spec.path} would be one directory, {stored_name(spec)}, where "
                "nodes keep what they fetch; rename one of them"
            )


def _reference(one: str | ModelSettings) -> str:
    return reference_of(one) if isinstance(one, ModelSettings) else one


def _ways(settings: Settings) -> WeightsSettings:
    assert settings.clustered is not None
    return settings.clustered.weights
