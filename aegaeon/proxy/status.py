"""What goes on now, by instance and by model: for `aegaeon top`, and for pages."""

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from typing import Literal

import msgspec

from aegaeon.figures import Histogram, InstanceFigures, ModelFigures, Sums
from aegaeon.metrics import Target
from aegaeon.nodes import MemberNow, NodeFiles, NodeNow
from aegaeon.placements import Placement
from aegaeon.proxy.answers import ModelCard
from aegaeon.proxy.metrics import Meter, Recent
from aegaeon.scheduler.dispatch import PREFILLING
from aegaeon.specs import Catalog, ModelSpec
from aegaeon.types import Instance, ModelId

Tier = Literal["device", "host", "disk"]


class InstanceNow(msgspec.Struct, frozen=True, kw_only=True):
    """One instance as it last described itself."""

    id: str
    state: str
    role: str
    device: str
    current: str | None
    loading: str | None
    resident: tuple[str, ...]
    waiting: int
    running: int
    switches: int
    restarts: int
    stall_s: float
    weight_bytes: int
    weight_budget_bytes: int
    kv_bytes: int
    kv_budget_bytes: int
    node: str = ""  # of a cluster
    lease_left_s: float | None = None  # if nobody renewed it; None: the store does not tell


class Quantiles(msgspec.Struct, frozen=True):
    """Of samples of the last minute or so, in seconds, about; None without samples."""

    p50: float | None
    p90: float | None


class ModelNow(msgspec.Struct, frozen=True, kw_only=True):
    """One model. `tier` is the nearest place where its weights are; `attained` is the share of its
    requests so far within both targets, None before the first has ended."""

    id: str
    status: Literal["running", "resident", "loading", "idle"]
    tier: Tier
    waiting: int
    running: int
    oldest_wait_s: float
    ttft_s: Quantiles
    tbt_s: Quantiles
    slo_ttft_s: float
    slo_tbt_s: float
    tokens_per_s: float
    finished: int
    failed: int
    attained: float | None
    replicas: int = 0  # instances whose device has it
    progress: float | None = None  # of a load: what share is in the node's cache
    failure: str = ""  # of the last load, if that came to nothing
    nodes: tuple[str, ...] = ()  # of a cluster, where it lives, and why that changed last
    leaving: tuple[str, ...] = ()  # nodes that serve it until those do
    serving: tuple[str, ...] = ()  # nodes that take new requests
    placed: str = ""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The body of GET /admin/status."""

    open_requests: int
    slo_ttft_s: float  # of models that say nothing else
    slo_tbt_s: float
    instances: tuple[InstanceNow, ...]
    models: tuple[ModelNow, ...]
    nodes: tuple[NodeNow, ...] = ()  # of a cluster, with its members
    members: tuple[MemberNow, ...] = ()
    placement: str = ""  # the rule by which models have their nodes
    levels: dict[str, float] = {}  # how busy nodes are to be with them
    files: tuple[NodeFiles, ...] = ()  # which models' files its nodes have, and which come to them


def status_of(meter: Meter, rows: tuple[Instance, ...], catalog: Catalog) -> Status:
    """Return what the meter has counted and the rows of the table say, of what is served."""
    placement = catalog.placement
    sums = meter.sums()
    recent = meter.recent(sums)
    cached = meter.cached()
    serving = _serving(rows)
    living = {node.id for node in meter.cluster.nodes}
    files = tuple(one for one in meter.files.values() if one.node in living)
    return Status(
        open_requests=sum(one.open for one in sums.models.values()),
        slo_ttft_s=meter.target.ttft_s,
        slo_tbt_s=meter.target.tbt_s,
        instances=tuple(_instance(row, sums.instances.get(row.record.id)) for row in rows),
        models=tuple(
            _with_files(
                _placed(
                    _model(
                        spec.id, sums, recent.get(spec.id), rows, cached, meter.target_of(spec.id)
                    ),
                    placement,
                    serving,
                ),
                rows,
                files,
            )
            for spec in catalog.models
        ),
        nodes=meter.cluster.nodes,
        members=meter.cluster.members,
        placement="" if placement is None else placement.rule,
        levels=meter.cluster.levels,
        files=files,
    )


def whereabouts(
    model: ModelId, rows: tuple[Instance, ...]
) -> Literal["running", "resident", "loading", "idle"]:
    """Return what is being done with a model."""
    if any(row.status.running.get(model) for row in rows):
        return "running"
    if any(model in row.status.resident for row in rows):
        return "resident"
    if any(model == row.status.loading for row in rows):
        return "loading"
    return "idle"


def tier_of(model: ModelId, rows: tuple[Instance, ...], cached: AbstractSet[ModelId]) -> Tier:
    """Return the nearest place where the weights of a model are."""
    if any(model in row.status.resident for row in rows):
        return "device"
    return "host" if model in cached else "disk"


def progress_of(model: ModelId, rows: tuple[Instance, ...]) -> float | None:
    """Return what share of a model that is being loaded is in the node's cache; None: none is."""
    shares = [row.status.coming for row in rows if row.status.loading == model]
    return max(shares, default=None)


def brought(model: ModelId, rows: tuple[Instance, ...], files: Iterable[NodeFiles]) -> float | None:
    """Return what share of a model's files has come to some node of a cluster; None where none is
    on its way, or an instance serves it already."""
    if any(model in row.record.models for row in rows):
        return None
    coming = [one.coming[model] for one in files if model in one.coming]
    return max((one.share for one in coming if not one.failure), default=None)


def failure_of(model: ModelId, rows: tuple[Instance, ...]) -> str:
    """Return that a model's last load failed, if it did; the reason may name files."""
    if any(model in row.status.failed for row in rows):
        return "its last load failed; the server's log says why"
    return ""


def failed_pins(specs: Iterable[ModelSpec], rows: tuple[Instance, ...]) -> tuple[str, ...]:
    """Return what is to be told of pinned models that are not there because their load failed."""
    failed = {model for row in rows for model in row.status.failed}
    failed -= {model for row in rows for model in row.status.resident}
    text = "could not be loaded; the server's log says why"
    pinned = (spec.id for spec in specs if spec.is_pinned and spec.id in failed)
    return tuple(f"the pinned model {model} {text}" for model in pinned)


def card_of(
    spec: ModelSpec,
    rows: tuple[Instance, ...],
    cached: AbstractSet[ModelId],
    started_s: int,
    files: Iterable[NodeFiles] = (),
) -> ModelCard:
    """Return what clients are told of a model."""
    share = brought(spec.id, rows, files)
    where = "loading" if share is not None else whereabouts(spec.id, rows)
    return ModelCard(
        id=spec.id,
        created=started_s,
        max_model_len=spec.context_tokens,
        quantize=spec.quantize,
        status="draining" if spec.is_draining else where,
        tier=tier_of(spec.id, rows, cached),
        progress=progress_of(spec.id, rows) if share is None else share,
        aliases=spec.aliases,
        pinned=spec.is_pinned,
        priority=spec.priority,
        idle_s=spec.idle_s,
    )


def _with_files(
    now: ModelNow, rows: tuple[Instance, ...], files: tuple[NodeFiles, ...]
) -> ModelNow:
    """Return it with how its files come to nodes of a cluster, where nobody serves it yet."""
    share = brought(now.id, rows, files)
    if share is not None:
        return msgspec.structs.replace(now, status="loading", progress=share)
    failed = any(now.id in one.coming and one.coming[now.id].failure for one in files)
    if not now.failure and failed and not any(now.id in row.record.models for row in rows):
        why = "its files do not come to any node; `aegaeon status` says why"
        return msgspec.structs.replace(now, failure=why)
    return now


def _instance(row: Instance, figures: InstanceFigures | None) -> InstanceNow:
    status, known = row.status, figures or InstanceFigures()
    return InstanceNow(
        id=row.record.id,
        state=status.state,
        role=row.record.role,
        device=row.record.device,
        current=status.current,
        loading=status.loading,
        resident=status.resident,
        waiting=sum(status.waiting.values()),
        running=sum(status.running.values()),
        switches=status.switches,
        restarts=max(0, known.starts - 1),
        stall_s=status.stall_s,
        weight_bytes=status.weight_bytes,
        weight_budget_bytes=known.weight_budget_bytes,
        kv_bytes=known.kv_bytes,
        kv_budget_bytes=known.kv_budget_bytes,
        node=row.record.node,
        lease_left_s=row.lease_left_s,
    )


def _model(
    model: ModelId,
    sums: Sums,
    recent: Recent | None,
    rows: tuple[Instance, ...],
    cached: AbstractSet[ModelId],
    target: Target,
) -> ModelNow:
    figures = sums.models.get(model, ModelFigures())
    judged = sum(figures.within.values())
    replicas = sum(model in row.status.resident for row in rows)
    return ModelNow(
        id=model,
        status=whereabouts(model, rows),
        tier=tier_of(model, rows, cached),
        waiting=sum(row.status.waiting.get(model, 0) for row in rows),
        running=sum(row.status.running.get(model, 0) for row in rows),
        oldest_wait_s=figures.oldest_wait_s,
        ttft_s=_quantiles(recent.ttft if recent else Histogram()),
        tbt_s=_quantiles(recent.tbt if recent else Histogram()),
        slo_ttft_s=target.ttft_s,
        slo_tbt_s=target.tbt_s,
        tokens_per_s=recent.tokens / recent.seconds if recent and recent.seconds else 0.0,
        finished=sum(figures.finished.values()),
        failed=sum(figures.failed.values()),
        attained=figures.within.get("both", 0) / judged if judged else None,
        replicas=replicas,
        progress=progress_of(model, rows),
        failure=failure_of(model, rows),
    )


def _serving(rows: Iterable[Instance]) -> dict[ModelId, list[str]]:
    """The nodes that take new requests of a model."""
    serving: dict[ModelId, list[str]] = {}
    for row in rows:
        if row.record.role in PREFILLING and row.status.state == "ready":
            for model in row.record.models:
                nodes = serving.setdefault(model, [])
                if row.record.node not in nodes:
                    nodes.append(row.record.node)
    return serving


def _placed(
    model: ModelNow, placement: Placement | None, serving: dict[ModelId, list[str]]
) -> ModelNow:
    """`model` with where it lives."""
    abode = None if placement is None else placement.abodes.get(model.id)
    if abode is None:
        return model
    return msgspec.structs.replace(
        model,
        nodes=abode.nodes,
        leaving=abode.leaving,
        serving=tuple(serving.get(model.id, ())),
        placed=abode.why,
    )


def _quantiles(samples: Histogram) -> Quantiles:
    return Quantiles(samples.quantile_s(0.5), samples.quantile_s(0.9))
