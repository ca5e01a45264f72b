"""What the models of a cluster need, measured: proxies tell on the board how many requests and
tokens came, instances what their steps take; together that is what devices have to do.

What came lately counts most. Of what nobody has asked for yet, each model needs as much as others.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from aegaeon.config import Settings
from aegaeon.errors import AegaeonError
from aegaeon.figures import InstanceFigures, ModelFigures, ProxyFigures, decode_figures
from aegaeon.metrics import Target
from aegaeon.scheduler.cost import ModelCost
from aegaeon.scheduler.demand import Flow, busy, loads_per_s
from aegaeon.scheduler.known_costs import known_costs
from aegaeon.scheduler.placement import Need
from aegaeon.specs import Bounds
from aegaeon.types import InstanceId, ModelId, ModelSpec

# Of all devices' time, shared out among the models beside what was measured: by it those that
# nobody asks for are spread over the nodes.
UNASKED = 0.05
KEPT_S = 600.0  # what a proxy had told that has fallen silent
NO_BUDGET = 1 << 30  # of a guess: sizes are those of the models


class _Counts(NamedTuple):
    """Of one model, since a proxy's name was first used."""

    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0

    def since(self, before: "_Counts") -> "_Counts":
        """What came since `before`; a name that began anew has counted all of it since."""
        pairs = zip(self, before, strict=True)
        return self if self.requests < before.requests else _Counts(*(a - b for a, b in pairs))


@dataclass(slots=True)
class _Told:
    """What a proxy had counted when it was looked at last."""

    at_s: float
    counts: dict[ModelId, _Counts] = field(default_factory=dict)


class Demands:
    """Owned by the controller's thread. `memory_s` is how long about what came counts."""

    def __init__(self, memory_s: float) -> None:
        """Nothing has come."""
        self._memory_s = memory_s
        self._proxies: dict[str, _Told] = {}
        self._rates: dict[ModelId, list[float]] = {}  # of _Counts, a second, faded
        self._weight = 0.0  # what of a mean over all time they are
        self._noted_s: float | None = None
        self.instances: dict[InstanceId, InstanceFigures] = {}

    def note(self, records: Mapping[str, bytes], now: float) -> None:
        """Take in what is on the board. What a name had counted when it was first seen here is of
        no time that is known."""
        proxies: dict[str, ProxyFigures] = {}
        instances: dict[InstanceId, InstanceFigures] = {}
        for name, record in records.items():
            figures = _figures(record)
            if isinstance(figures, ProxyFigures) and not figures.folded:
                proxies[name] = figures
            elif isinstance(figures, InstanceFigures):
                instances[name] = figures
        self.instances = instances
        came: dict[ModelId, list[int]] = {}
        for name, one in proxies.items():
            for model, counts in self._came(name, one, now).items():
                sums = came.setdefault(model, [0, 0, 0])
                sums[:] = [a + b for a, b in zip(sums, counts, strict=True)]
        for name in [n for n, told in self._proxies.items() if now - told.at_s > KEPT_S]:
            del self._proxies[name]
        if self._noted_s is not None and now > self._noted_s:
            self._fade(came, now - self._noted_s)
        self._noted_s = now

    @property
    def is_young(self) -> bool:
        """Whether too little was seen to say that something needs less than it has."""
        return self._weight < 0.5

    def flow(self, model: ModelId) -> Flow:
        """Return the requests of `model` that came of late, in the mean."""
        rates = self._rates.get(model)
        if rates is None or not self._weight:
            return Flow(0.0, 0.0, 0.0)
        requests, prompt, output = (rate / self._weight for rate in rates)
        # Answers may still go on when no requests come any more: as if of few, long ones.
        each = max(requests, 1 / self._memory_s)
        return Flow(each, prompt / each, output / each)

    def needs(
        self,
        specs: Collection[ModelSpec],
        settings: Settings,
        devices: int,
        alive: Collection[InstanceId],
    ) -> list[Need]:
        """Return what each of `specs` needs, by the steps of those instances that are `alive`, on
        so many devices in all."""
        guesses = known_costs(None, settings, tuple(specs), NO_BUDGET).costs.models
        told = [one for name, one in self.instances.items() if name in alive]
        unasked = UNASKED * devices / max(len(specs), 1)
        return [self._need(spec, settings, _cost(spec, guesses, told), unasked) for spec in specs]

    def _need(self, spec: ModelSpec, settings: Settings, cost: ModelCost, unasked: float) -> Need:
        flow = self.flow(spec.id)
        target = Target(
            spec.slo_ttft_s or settings.slo_ttft_s, spec.slo_tbt_s or settings.slo_tbt_s
        )
        is_asked = flow.requests_per_s > 0.0
        return Need(
            model=spec.id,
            weight_bytes=spec.weight_bytes,
            busy=unasked + (busy(flow, cost, target) if is_asked else 0.0),
            loads_per_s=loads_per_s(flow, target) if is_asked else 0.0,
            labels=labelled(spec.labels),
            least=spec.replicas,
        )

    def _came(self, name: str, figures: ProxyFigures, now: float) -> dict[ModelId, _Counts]:
        counts = {model: _counts(one) for model, one in figures.models.items()}
        before = self._proxies.get(name)
        self._proxies[name] = _Told(now, counts)
        if before is None:
            return {}
        return {
            model: one.since(before.counts.get(model, _Counts())) for model, one in counts.items()
        }

    def _fade(self, came: Mapping[ModelId, Iterable[int]], took_s: float) -> None:
        kept = math.exp(-took_s / self._memory_s)
        self._weight = kept * self._weight + (1 - kept)
        for model in came.keys() | self._rates.keys():
            rates = self._rates.setdefault(model, [0.0, 0.0, 0.0])
            new = came.get(model, (0, 0, 0))
            rates[:] = [
                kept * rate + (1 - kept) * count / took_s
                for rate, count in zip(rates, new, strict=True)
            ]
            if max(rates) < 1e-9:
                del self._rates[model]


def labelled(labels: Mapping[str, str]) -> frozenset[str]:
    """Return labels as placement compares them."""
    return frozenset(f"{key}={value}" for key, value in labels.items())


def with_bounds(settings: Settings, bounds: Bounds | None) -> Settings:
    """Return the settings as they are by now."""
    if bounds is None:
        return settings
    return msgspec.structs.replace(settings, **msgspec.structs.asdict(bounds))


def _counts(figures: ModelFigures) -> _Counts:
    arrived = figures.request.count + figures.open
    return _Counts(arrived, figures.prompt_tokens, figures.generated_tokens)


def _cost(
    spec: ModelSpec, guesses: Mapping[ModelId, ModelCost], told: Iterable[InstanceFigures]
) -> ModelCost:
    """The mean of what instances tell of the steps of a model, else a guess."""
    known = [
        (one.prefill, one.decode)
        for figures in told
        if (one := figures.models.get(spec.id)) is not None
        if one.prefill is not None and one.decode is not None
    ]
    if not known:
        return guesses[spec.id]
    prefill, decode = (
        tuple(math.fsum(three[at] for three in threes) / len(known) for at in range(3))
        for threes in zip(*known, strict=True)
    )
    return msgspec.structs.replace(guesses[spec.id], prefill=prefill, decode=decode)


def _figures(record: bytes) -> object:
    """What a record says; None: it is none of figures, of which boards have others."""
    try:
        return decode_figures(record)
    except AegaeonError:
        return None
