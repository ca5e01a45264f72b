"""What an instance counts of itself since its name was first used, published about once a second.

For whoever looks; nothing here is used to decide anything.
"""

import logging
from collections.abc import Callable, Mapping

from aegaeon.engine.base import EngineUsage
from aegaeon.errors import AegaeonError
from aegaeon.figures import (
    DeviceFigures,
    Done,
    InstanceFigures,
    decode_figures,
    encode_figures,
    summed,
)
from aegaeon.measures import PhaseTotal
from aegaeon.scheduler.cost import ModelCost
from aegaeon.types import (
    InstanceStatus,
    Load,
    Loaded,
    LoadFailed,
    ModelId,
    Outcome,
    Switched,
)

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
OUTAGE_S = 10.0  # between attempts while there is no room or nobody answers
DISPLACED = "displaced"  # by what came, without having been chosen


class Counts:
    """Owned by one runtime. `publish` may raise an AegaeonError; `before` is what the last process
    of this name published, which may have been ended as one that `was_hung`."""

    def __init__(
        self,
        publish: Callable[[bytes], None] | None = None,
        before: bytes | None = None,
        was_hung: bool = False,
        costs: Mapping[ModelId, ModelCost] | None = None,
        cache_budget_bytes: int = 0,
    ) -> None:
        """`costs` are told of models that had the device, None: nobody places by them."""
        self._publish = publish
        self._costs = costs or {}
        self._due_s = float("-inf")
        self._figures = _continued(before)
        self._figures.starts += 1
        self._figures.hung += was_hung
        self._figures.cache_budget_bytes = cache_budget_bytes
        # What engine and steps count since this process began comes on top of it.
        self._before = _continued(before)

    @property
    def figures(self) -> InstanceFigures:
        """What has been counted; the sums of engine and steps as last published."""
        return self._figures

    def switched(self, outcome: Switched, reason: str) -> None:
        """The device was given to a model, by a decision with `reason`."""
        self._moved(outcome.model, "switch", reason, outcome.took_s)

    def load_began(self, load: Load, reason: str) -> None:
        """Models make way."""
        for model in load.evict:
            self._evicted(model, "device", reason)

    def load_ended(self, load: Load, outcome: Outcome, phase: str, reason: str) -> None:
        """Weights or, in the phase `kv`, keys and values only, have come or not."""
        match outcome:
            case Loaded(took_s=took_s, evicted=evicted):
                self._moved(load.model, phase, reason, took_s)
                for model in set(evicted) - set(load.evict):
                    self._evicted(model, "device", DISPLACED)
            case LoadFailed():
                self.load_failed(load.model)

    def load_failed(self, model: ModelId) -> None:
        """Weights could not be had."""
        self._figures.of(model).failed_loads += 1

    def preempted(self, model: ModelId) -> None:
        """A request has lost its KV."""
        self._figures.of(model).preemptions += 1

    def publish(self, usage: EngineUsage, status: InstanceStatus, now: float) -> None:
        """Publish, if it is time to."""
        if self._publish is None or now < self._due_s:
            return
        self._due_s = now + INTERVAL_S
        self._take(usage, status)
        try:
            self._publish(encode_figures(self._figures))
        except AegaeonError as error:
            self._due_s = now + OUTAGE_S
            log.warning("figures not published error=%s", error)

    def _take(self, usage: EngineUsage, status: InstanceStatus) -> None:
        figures, before = self._figures, self._before
        figures.beats += 1
        figures.weight_bytes = usage.weight_bytes
        figures.weight_budget_bytes = usage.weight_budget_bytes
        figures.kv_bytes, figures.kv_budget_bytes = usage.kv_bytes, usage.kv_budget_bytes
        figures.stage_bytes, figures.grammar_host_bytes = (
            usage.stage_bytes,
            usage.grammar_host_bytes,
        )
        figures.cached = usage.cached
        figures.compute_s = before.compute_s + status.compute_s
        figures.expected_s = before.expected_s + status.expected_s
        figures.stall_s = before.stall_s + status.stall_s
        figures.moved = {
            phase: _both(before.moved.get(phase, PhaseTotal()), total)
            for phase, total in usage.moved.items()
        }
        for model, counted in figures.models.items():
            cost = self._costs.get(model)
            if cost is not None:
                counted.prefill, counted.decode = cost.prefill, cost.decode
        for model, reasons in usage.evicted.items():
            known = before.models.get(model, DeviceFigures()).evictions.get("host", {})
            figures.of(model).evictions["host"] = summed(known, reasons)

    def _moved(self, model: ModelId, phase: str, reason: str, took_s: float) -> None:
        done = self._figures.of(model).moves.setdefault(phase, {}).setdefault(reason, Done())
        done.count += 1
        done.seconds += took_s

    def _evicted(self, model: ModelId, tier: str, reason: str) -> None:
        reasons = self._figures.of(model).evictions.setdefault(tier, {})
        reasons[reason] = reasons.get(reason, 0) + 1


def _continued(before: bytes | None) -> InstanceFigures:
    """Return the figures to go on from."""
    if before is None:
        return InstanceFigures()
    try:
        figures = decode_figures(before)
    except AegaeonError as error:
        log.warning("figures begin anew error=%s", error)
        return InstanceFigures()
    return figures if isinstance(figures, InstanceFigures) else InstanceFigures()


def _both(one: PhaseTotal, other: PhaseTotal) -> PhaseTotal:
    return PhaseTotal(
        one.count + other.count, one.moved_bytes + other.moved_bytes, one.seconds + other.seconds
    )
