"""Figures that the processes of a domain publish of themselves, and their sums.

Each publishes all it has counted since its name was first used, once a second or so; whoever is
asked adds up what was published last. Only data and its arithmetic live here.
"""

import bisect
from collections.abc import Iterable

import msgspec

from aegaeon.errors import RegionMismatch
from aegaeon.measures import Phase, PhaseTotal
from aegaeon.metrics import Target
from aegaeon.nodes import ClusterFigures, NodeFiles
from aegaeon.types import InstanceId, ModelId

# From a step of a small model to what nobody waits for.
BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0),
)
MAX_FOLDED = 256  # names that figures remember to have
MAX_GONE_MODELS = 1024  # of proxies that have ended
WITHIN = ("both", "ttft", "tbt", "neither")  # of the two targets, by request


class Histogram(msgspec.Struct, array_like=True):
    """How many samples were at most each of BUCKETS_S and above the one before; the rest last."""

    counts: list[int] = msgspec.field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))
    sum_s: float = 0.0

    def note(self, sample_s: float, times: int = 1) -> None:
        """Count a sample."""
        self.counts[bisect.bisect_left(BUCKETS_S, sample_s)] += times
        self.sum_s += sample_s * times

    def add(self, other: "Histogram") -> None:
        """Count all samples of `other`, too."""
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.sum_s += other.sum_s

    def minus(self, earlier: "Histogram") -> "Histogram":
        """Return what was counted since `earlier`."""
        counts = [a - b for a, b in zip(self.counts, earlier.counts, strict=True)]
        return Histogram(counts, self.sum_s - earlier.sum_s)

    @property
    def count(self) -> int:
        """All samples."""
        return sum(self.counts)

    def quantile_s(self, share: float) -> float | None:
        """Return about the sample that `share` of them are not above, as Prometheus does: linear
        within a bucket, the highest bound for what is above it. None without samples."""
        total = self.count
        if not total:
            return None
        rank, below = share * total, 0
        for index, count in enumerate(self.counts[:-1]):
            if count and below + count >= rank:
                low = BUCKETS_S[index - 1] if index else 0.0
                return low + (BUCKETS_S[index] - low) * (rank - below) / count
            below += count
        return BUCKETS_S[-1]


class ModelFigures(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What a proxy counts of one model: requests it took in, and what became of them."""

    ttft: Histogram = msgspec.field(default_factory=Histogram)
    tbt: Histogram = msgspec.field(default_factory=Histogram)
    request: Histogram = msgspec.field(default_factory=Histogram)  # from arrival to the end
    queue: Histogram = msgspec.field(default_factory=Histogram)  # of Waited, of what has ended
    switch_s: float = 0.0  # likewise
    switches: int = 0
    preempted_s: float = 0.0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    tokens_in_time: int = 0
    cached_tokens: int = 0  # of prompts, that were not prefilled again
    finished: dict[str, int] = {}  # by finish reason
    within: dict[str, int] = {}  # WITHIN
    failed: dict[str, int] = {}  # by the error's code
    cancelled: int = 0
    open: int = 0  # now
    oldest_wait_s: float = 0.0  # of those that have no token yet

    def add(self, other: "ModelFigures") -> None:
        """Add what another proxy counted; of the oldest waits the older one stays."""
        for name in ("ttft", "tbt", "request", "queue"):
            getattr(self, name).add(getattr(other, name))
        for name in ("finished", "within", "failed"):
            setattr(self, name, summed(getattr(self, name), getattr(other, name)))
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.oldest_wait_s = max(self.oldest_wait_s, other.oldest_wait_s)


_SUMS = (
    *("switch_s", "switches", "preempted_s", "prompt_tokens", "generated_tokens"),
    *("tokens_in_time", "cached_tokens", "cancelled", "open"),
)


class ProxyFigures(msgspec.Struct, tag="proxy", kw_only=True, omit_defaults=True):
    """What a proxy publishes. `starts` counts how often its name began anew, `beats` how often it
    was published, `hung` how often it was ended because it did not answer; `responses` are those by
    route and status, `dropped` what ended below the routes, by why, `traces` by what became of
    them. A name that `is_passing` is not used again. `folded` are the last names whose figures have
    been added to these."""

    starts: int = 0
    beats: int = 0
    models: dict[ModelId, ModelFigures] = {}
    responses: dict[str, dict[str, int]] = {}
    dropped: dict[str, int] = {}
    traces: dict[str, int] = {}  # sent, lost
    hung: int = 0
    is_passing: bool = False
    folded: tuple[str, ...] = ()

    def of(self, model: ModelId) -> ModelFigures:
        """Return the figures of `model`, to be added to."""
        found = self.models.get(model)
        if found is None:
            found = self.models[model] = ModelFigures()
        return found


class Done(msgspec.Struct, array_like=True):
    """How often something was done, and how long that took together."""

    count: int = 0
    seconds: float = 0.0


class DeviceFigures(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What an instance counts of one model. `moves` are by phase, `switch` (of the device) or
    `load` (of weights), and the code of the reason; `evictions` by tier, `device` or `host`, and
    reason. `prefill` and `decode` are what its steps take there, as of ModelCost, where nodes are
    placed by it and steps were made."""

    moves: dict[str, dict[str, Done]] = {}
    evictions: dict[str, dict[str, int]] = {}
    preemptions: int = 0  # requests that lost their KV
    failed_loads: int = 0
    prefill: tuple[float, float, float] | None = None
    decode: tuple[float, float, float] | None = None


class InstanceFigures(msgspec.Struct, tag="instance", kw_only=True, omit_defaults=True):
    """What an instance publishes, `beats` times so far; `starts` and `hung` as of proxies. Bytes
    are those of now; `cached` are the models that the node's cache holds, of at most
    `cache_budget_bytes` where that was laid out."""

    starts: int = 0
    hung: int = 0
    beats: int = 0
    models: dict[ModelId, DeviceFigures] = {}
    moved: dict[Phase, PhaseTotal] = {}
    weight_bytes: int = 0
    weight_budget_bytes: int = 0
    kv_bytes: int = 0
    kv_budget_bytes: int = 0
    stage_bytes: int = 0
    grammar_host_bytes: int = 0  # of its process that follows schemas
    cached: tuple[ModelId, ...] = ()
    cache_budget_bytes: int = 0
    compute_s: float = 0.0
    expected_s: float = 0.0
    stall_s: float = 0.0

    def of(self, model: ModelId) -> DeviceFigures:
        """Return the figures of `model`, to be added to."""
        found = self.models.get(model)
        if found is None:
            found = self.models[model] = DeviceFigures()
        return found


class Sums(msgspec.Struct, kw_only=True):
    """What a domain has counted, all its proxies together; instances each for itself."""

    models: dict[ModelId, ModelFigures] = {}
    responses: dict[str, dict[str, int]] = {}
    dropped: dict[str, int] = {}
    traces: dict[str, int] = {}
    proxies_hung: int = 0
    proxy_restarts: int = 0
    instances: dict[InstanceId, InstanceFigures] = {}


Figures = ProxyFigures | InstanceFigures | ClusterFigures | NodeFiles

_encoder = msgspec.msgpack.Encoder()
_decoder: "msgspec.msgpack.Decoder[Figures]" = msgspec.msgpack.Decoder(
    ProxyFigures | InstanceFigures | ClusterFigures | NodeFiles
)


def encode_figures(figures: "Figures") -> bytes:
    """Return the bytes to publish."""
    return _encoder.encode(figures)


def decode_figures(record: bytes) -> "Figures":
    """Read what was published. Raises RegionMismatch on other bytes."""
    try:
        return _decoder.decode(record)
    except msgspec.MsgspecError as error:
        raise RegionMismatch(
            f"{len(record)} bytes are no figures ({error}); run one version of aegaeon per domain"
        ) from None


def summed_up(proxies: Iterable[ProxyFigures]) -> Sums:
    """Return the sums of `proxies`, which stay as they are."""
    sums = Sums()
    for proxy in proxies:
        for model, figures in proxy.models.items():
            sums.models.setdefault(model, ModelFigures()).add(figures)
        for route, statuses in proxy.responses.items():
            sums.responses[route] = summed(sums.responses.get(route, {}), statuses)
        sums.dropped = summed(sums.dropped, proxy.dropped)
        sums.traces = summed(sums.traces, proxy.traces)
        sums.proxies_hung += proxy.hung
    return sums


def folded_up(gone: ProxyFigures | None, name: str, figures: ProxyFigures) -> ProxyFigures:
    """Return the figures of those that have ended: of `gone`, and of `name`, if they lack them."""
    known = () if gone is None else gone.folded
    if name in known:
        assert gone is not None
        return gone
    sums = summed_up([figures] if gone is None else [gone, figures])
    for one in sums.models.values():
        one.open, one.oldest_wait_s = 0, 0.0
    return ProxyFigures(
        starts=1,
        models=dict(tuple(sums.models.items())[-MAX_GONE_MODELS:]),
        responses=sums.responses,
        dropped=sums.dropped,
        traces=sums.traces,
        hung=sums.proxies_hung,
        folded=(*known, name)[-MAX_FOLDED:],
    )


def silenced(figures: ProxyFigures) -> ProxyFigures:
    """Return the figures of a proxy that has ended: its requests are gone."""
    models = {
        model: msgspec.structs.replace(one, open=0, oldest_wait_s=0.0)
        for model, one in figures.models.items()
    }
    return msgspec.structs.replace(figures, models=models)


def summed(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    """Return the counts of both, by name."""
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}


def within(ttft_s: float, mean_tbt_s: float, target: Target) -> str:
    """Return which of WITHIN a request was."""
    match (ttft_s <= target.ttft_s, mean_tbt_s <= target.tbt_s):
        case (True, True):
            return "both"
        case (True, False):
            return "ttft"
        case (False, True):
            return "tbt"
        case _:
            return "neither"
