"""Models added, pinned and taken away while serving: changes of the domain's catalogue, which all
its processes follow. Which files a name means is the operator's: clients name no paths.
"""

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec

from aegaeon.config import ModelSettings, Settings
from aegaeon.errors import AegaeonError, ConfigError, DeadlineExceeded, Overloaded
from aegaeon.models.here import for_all_nodes
from aegaeon.models.hub_ids import HUB_ID, NAME, directory_name
from aegaeon.models.references import MAX_NAME_CHARS, check_names, describe_model, with_settings
from aegaeon.proxy.failures import ApiError, invalid
from aegaeon.proxy.service import Service
from aegaeon.scheduler.dispatch import PREFILLING
from aegaeon.specs import Catalog, check_room
from aegaeon.store.catalog import CatalogStore
from aegaeon.types import Instance, ModelId, ModelSpec

log = logging.getLogger(__name__)

SETTLE_S = 10.0  # for instances to say what they make of a change
LOAD_S = 2.0  # for a load that a change brings about; it may take longer
_LOOK_S = 0.05

Standing = Literal["resident", "loading", "served", "pending", "draining", "pinned", "unpinned"]
Load = Literal["resident", "loading", "failed"]


class ModelChange(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer to a change. `pending`: not all instances have followed yet; they will. `load` is
    what has become of a load that the change brings about."""

    id: str
    status: Standing
    version: int
    load: Load | None = None
    reason: str = ""  # why it has failed


class Models:
    """Changes the catalogue for administrators. One event loop owns it."""

    def __init__(self, settings: Settings, store: CatalogStore, service: Service) -> None:
        self._settings = settings
        self._store = store
        self._service = service
        self._gateway = service.gateway

    async def add(self, asked: ModelSettings) -> ModelChange:
        """Serve a model of the models directory. Raises ApiError: 400 for what is no name, 404
        where there is none, 409 for a name that is taken and a model that does not fit."""
        spec = await self._described(asked)

        def added(catalog: Catalog) -> Catalog:
            try:
                check_names((*catalog.models, spec))
            except ConfigError:
                text = f"one of the names {', '.join(spec.names)} is taken; choose another id"
                raise ApiError(409, "model_exists", text, "id") from None
            try:
                check_room((*catalog.models, spec))
            except ConfigError as error:
                raise ApiError(409, "model_refused", str(error), "id") from None
            return catalog.with_model(spec)

        after = await self._change(added)
        why = await self._refusal(spec.id, after.version)
        if why is not None:
            await self._change(lambda catalog: _without(catalog, spec))
            raise ApiError(409, "model_refused", self._told(why), "reference")
        # On nodes of a cluster that lack its files it is served once these have come.
        is_served = any(spec.id in row.record.models for row in self._gateway.instances())
        is_settled = is_served and self._is_settled(after.version)
        log.info("model added model=%s by=admin", spec.id)
        return ModelChange(spec.id, "served" if is_settled else "pending", after.version)

    async def remove(self, model: ModelId) -> ModelChange:
        """Let a model take no new requests; it goes when the last one has ended. Raises ApiError
        404."""
        after = await self._change(lambda catalog: _with(catalog, model, is_draining=True))
        log.info("model draining model=%s by=admin", model)
        return ModelChange(_found(after, model).id, "draining", after.version)

    async def pin(self, model: ModelId, is_pinned: bool) -> ModelChange:
        """Have a model loaded, and make room for no other; or end that. Raises ApiError 404, and
        409 for one that is being removed, and when what is pinned would leave too little for
        others."""
        before: list[ModelSpec] = []

        def pinned(catalog: Catalog) -> Catalog:
            before[:] = [_staying(catalog, model) if is_pinned else _found(catalog, model)]
            return _with(catalog, model, is_pinned=is_pinned)

        after = await self._change(pinned)
        found = _found(after, model)
        why = await self._refusal(found.id, after.version)
        if why is not None and is_pinned:
            await self._change(lambda catalog: _put_back(catalog, found, before[0]))
            raise ApiError(409, "model_refused", self._told(why), "model")
        log.info("model pinned=%s model=%s by=admin", is_pinned, found.id)
        if not is_pinned:
            return ModelChange(found.id, "unpinned", after.version)
        return ModelChange(found.id, "pinned", after.version, *await self._load_of(found.id))

    async def load(self, model: ModelId) -> ModelChange:
        """Have a model brought in where it fits, at the least busy instance that prefills. Raises
        ApiError 404, 409 for one that is being removed, and 503 while no instance can."""
        catalog = self._service.catalog
        spec = _staying(catalog, model)
        rows = [row for row in self._gateway.instances() if _may_load(row, spec.id)]
        if any(spec.id in row.status.resident for row in rows):
            return ModelChange(spec.id, "resident", catalog.version)
        if not rows:
            raise ApiError(503, "overloaded", f"no instance is ready for {spec.id!r}", "model")
        row = min(rows, key=lambda row: row.status.load)
        await self._gateway.preload(spec.id, row.record.id)
        return ModelChange(spec.id, "loading", catalog.version)

    async def _described(self, asked: ModelSettings) -> ModelSpec:
        reference, settings = asked.reference, self._settings
        if not (NAME.fullmatch(reference) or HUB_ID.fullmatch(reference)):
            raise invalid("reference", "'reference' must be a model's name, not a path")
        path = Path(settings.models_dir).expanduser() / directory_name(reference)
        if not path.is_dir():
            text = f"no model {reference!r} is in the models directory; pull or import it there"
            raise ApiError(404, "model_not_found", text, "reference")
        try:
            described = partial(describe_model, path, asked.id or None)
            plain = await asyncio.to_thread(described, settings.kv_dtype, settings.quantize)
            spec = with_settings(plain, asked)
            if settings.clustered is not None:
                spec = for_all_nodes(spec, settings.models_dir)
            _check_own_names(spec)
            await self._service.try_text(spec)
            return spec
        except (DeadlineExceeded, Overloaded):
            raise
        except AegaeonError as error:
            log.error("model not added reference=%s error=%s", reference, error)
            text = f"{reference!r} cannot be served ({error.code}); the server's log says why"
            raise ApiError(409, "model_refused", text, "reference") from None

    async def _change(self, edit: Callable[[Catalog], Catalog]) -> Catalog:
        after = await asyncio.to_thread(self._store.change, edit)
        self._service.follow(after)  # at once: who asked may look
        return after

    async def _refusal(self, model: ModelId, version: int) -> str | None:
        """Wait until the instances have followed, and return why one of them could not."""
        give_up_s = asyncio.get_running_loop().time() + SETTLE_S
        while True:
            for row in self._gateway.instances():
                if row.status.catalog >= version and model in row.status.refused:
                    return row.status.refused[model]
            if self._is_settled(version) or asyncio.get_running_loop().time() >= give_up_s:
                return None
            await asyncio.sleep(_LOOK_S)

    async def _load_of(self, model: ModelId) -> tuple[Load, str]:
        """Return what becomes of a load within LOAD_S, and why it has failed."""
        give_up_s = asyncio.get_running_loop().time() + LOAD_S
        while True:
            rows = [row for row in self._gateway.instances() if _may_load(row, model)]
            if any(model in row.status.resident for row in rows):
                return "resident", ""
            why = next((row.status.failed[model] for row in rows if model in row.status.failed), "")
            if why:
                return "failed", self._told(why)
            if asyncio.get_running_loop().time() >= give_up_s:
                return "loading", ""
            await asyncio.sleep(_LOOK_S)

    def _is_settled(self, version: int) -> bool:
        rows = self._gateway.instances()
        return bool(rows) and all(_has_followed(row, version) for row in rows)

    def _told(self, why: str) -> str:
        """Return the reason without places of this machine."""
        is_inside = str(Path(self._settings.models_dir).expanduser()) in why
        return "an instance cannot serve it; the server's log says why" if is_inside else why


def _has_followed(row: Instance, version: int) -> bool:
    return row.status.state != "ready" or row.status.catalog >= version


def _may_load(row: Instance, model: ModelId) -> bool:
    is_able = row.status.state == "ready" and row.record.role in PREFILLING
    return is_able and model in row.record.models


def _found(catalog: Catalog, model: ModelId) -> ModelSpec:
    spec = catalog.find(model)
    if spec is None:
        raise ApiError(404, "model_not_found", f"no model {model!r} is served", "model")
    return spec


def _staying(catalog: Catalog, model: ModelId) -> ModelSpec:
    spec = _found(catalog, model)
    if spec.is_draining:
        text = f"model {model!r} is being removed; add it again when it is gone"
        raise ApiError(409, "model_draining", text, "model")
    return spec


def _check_own_names(spec: ModelSpec) -> None:
    try:
        check_names((spec,))
    except ConfigError:  # whose text has the place of the files in it
        names = ", ".join(repr(name[:MAX_NAME_CHARS]) for name in spec.names)
        text = f"take 1 to {MAX_NAME_CHARS} printable characters for each name, none of them twice"
        raise invalid("aliases" if spec.aliases else "id", f"{text}: {names}") from None


def _with(catalog: Catalog, model: ModelId, **changes: bool) -> Catalog:
    return catalog.with_model(msgspec.structs.replace(_found(catalog, model), **changes))


def _put_back(catalog: Catalog, spec: ModelSpec, before: ModelSpec) -> Catalog:
    """The catalogue with `before` in the place of `spec`, unless somebody has changed that."""
    return catalog.with_model(before) if spec in catalog.models else catalog


def _without(catalog: Catalog, spec: ModelSpec) -> Catalog:
    """The catalogue without `spec`, unless somebody has put another one in its place."""
    return catalog.without_model(spec.id) if spec in catalog.models else catalog
