"""What a proxy counts of the requests it serves, and what all processes of the domain have counted.

Counted where it happens, on the gateway's loop; published and read about once a second on its
sender thread. Whoever asks gets what was read last and waits for nobody.
"""

import logging
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any

import msgspec

from aegaeon.config import Settings
from aegaeon.deaths import DEATHS
from aegaeon.errors import AegaeonError
from aegaeon.figures import (
    Histogram,
    InstanceFigures,
    ModelFigures,
    ProxyFigures,
    Sums,
    decode_figures,
    encode_figures,
    folded_up,
    silenced,
    summed,
    summed_up,
    within,
)
from aegaeon.measures import Waited
from aegaeon.metrics import Target
from aegaeon.nodes import CLUSTER, FILES, ClusterFigures, NodeFiles
from aegaeon.proxy.traces import Run
from aegaeon.specs import Bounds, ModelSpec
from aegaeon.store.base import Board, Domain
from aegaeon.types import InstanceId, ModelId, TokenEvent

log = logging.getLogger(__name__)

Blocking = Callable[[Callable[[], Any]], Awaitable[Any]]  # runs what may wait, elsewhere

METER = "aegaeon.meter"  # where the state that the application's life yields has it
INTERVAL_S = 1.0
OUTAGE_S = 10.0  # between attempts while there is no room or nobody answers
SILENT_S = 15.0  # a proxy that publishes nothing for so long is dead
GONE = "gone-proxies"  # whose record has the figures of those that have ended
MAX_REMOVED = 64  # models that are served no more, whose figures stay
WINDOW_S, WINDOW_STEP_S = 60.0, 5.0  # of which `recent` tells
# Faults of the request itself, by which no promise is broken.
NOT_OURS = frozenset(
    {
        *("invalid_value", "unsupported_parameter", "context_length_exceeded"),
        *("record_too_large", "out_of_blocks", "model_not_found"),
    }
)


class Timing:
    """Of one request: when its tokens came. Counts them as they come."""

    __slots__ = ("_figures", "_prompt", "_target", "arrival_s", "cached_tokens", "count", "first_s",
                 "last_s", "run")  # fmt: skip

    def __init__(
        self, figures: ModelFigures, target: Target, prompt_tokens: int, arrival_s: float
    ) -> None:
        """Counts into `figures`, which are its model's."""
        self.run: Run | None = None  # where it is traced
        self._figures = figures
        self._target = target
        self._prompt = prompt_tokens
        self.arrival_s = arrival_s
        self.first_s = self.last_s = arrival_s
        self.count = 0
        self.cached_tokens = 0  # of the prompt, when it was prefilled first

    def note(self, tokens: int, at_s: float) -> None:
        """So many tokens have come, at once."""
        figures = self._figures
        first = self.count
        if first:
            figures.tbt.note(at_s - self.last_s)
        else:
            self.first_s = at_s
            figures.ttft.note(at_s - self.arrival_s)
            figures.prompt_tokens += self._prompt
            figures.cached_tokens += self.cached_tokens
        if tokens > 1:
            figures.tbt.note(0.0, tokens - 1)
        self.last_s = at_s
        self.count += tokens
        figures.generated_tokens += tokens
        if at_s <= self._target.due_s(self.arrival_s, first):
            figures.tokens_in_time += tokens  # the others are due later
            return
        for token in range(first + 1, self.count):
            figures.tokens_in_time += at_s <= self._target.due_s(self.arrival_s, token)

    def heard(self, event: TokenEvent, at_s: float) -> None:
        """With tokens that are not counted yet, it was told what had been waited for."""
        if self.run is not None:
            self.run.heard(event, self.last_s, self.count, at_s)

    def finished(self, reason: str, waited: Waited, now: float) -> None:
        """The request has got what it wanted."""
        if self.run is not None:
            self.run.finish_reason = reason
        gaps = max(1, self.count - 1)
        ttft_s, tbt_s = self.first_s - self.arrival_s, (self.last_s - self.first_s) / gaps
        self._end(within(ttft_s, tbt_s, self._target), waited, now)
        _count(self._figures, "finished", reason)

    def failed(self, code: str, waited: Waited, now: float) -> None:
        """The request ended in an error with `code`."""
        if self.run is not None:
            self.run.error = code
        self._end(None if code in NOT_OURS else "neither", waited, now)
        _count(self._figures, "failed", code)

    def cancelled(self, waited: Waited, now: float) -> None:
        """The client went away: no promise was kept or broken."""
        self._end(None, waited, now)
        self._figures.cancelled += 1

    def _end(self, kept: str | None, waited: Waited, now: float) -> None:
        figures = self._figures
        if (run := self.run) is not None:
            run.tokens, run.cached_tokens = self.count, self.cached_tokens
            run.first_s, run.last_s, run.end_s = self.first_s, self.last_s, now
        figures.request.note(now - self.arrival_s)
        figures.queue.note(waited.queue_s)
        figures.switch_s += waited.switch_s
        figures.switches += waited.switches
        figures.preempted_s += waited.preempted_s
        if kept is not None:
            _count(figures, "within", kept)


class Recent(msgspec.Struct, frozen=True):
    """What was counted of a model in the last WINDOW_S or so; `seconds` is how long that was."""

    ttft: Histogram
    tbt: Histogram
    tokens: int
    seconds: float


class Meter:
    """One proxy's, for one event loop. `waiting` says how many requests are open now by model, and
    how long the oldest has waited for its first token."""

    def __init__(
        self,
        settings: Settings,
        waiting: Callable[[float], dict[ModelId, tuple[int, float]]],
    ) -> None:
        self.target = Target(settings.slo_ttft_s, settings.slo_tbt_s)
        self._waiting = waiting
        self._own = ProxyFigures(starts=1)
        self._targets: dict[ModelId, Target] = {}  # of those that are served
        self._removed: dict[ModelId, None] = {}  # the last one last
        self._others: dict[str, ProxyFigures] = {}
        self._instances: dict[InstanceId, InstanceFigures] = {}
        self.cluster = ClusterFigures()  # as its controller last told, if there is one
        self.files: dict[str, NodeFiles] = {}  # of its nodes, as their porters last told
        self._heard: dict[str, tuple[bytes, float]] = {}  # by name the last record, and since when
        self._board: Board
        self._name = ""
        self._is_folded = False
        self._traces: Callable[[], dict[str, int]] = dict
        self._seen_traces: dict[str, int] = {}
        self._due_s = 0.0
        self._window: deque[tuple[float, dict[ModelId, ModelFigures]]] = deque(
            maxlen=int(WINDOW_S / WINDOW_STEP_S)
        )

    def serve(self, specs: Iterable[ModelSpec]) -> None:
        """These are served from here on. What was counted of others stays, of the last MAX_REMOVED
        of them and of those that have requests open."""
        default = self.target
        self._targets.clear()
        for spec in specs:
            self._own.of(spec.id)
            times = spec.slo_ttft_s or default.ttft_s, spec.slo_tbt_s or default.tbt_s
            self._targets[spec.id] = Target(*times)
        self._forget_removed()

    def target_of(self, model: ModelId) -> Target:
        """Return what is promised of a model."""
        return self._targets.get(model, self.target)

    def bound(self, bounds: Bounds) -> None:
        """Promise this of models that say nothing else, when `serve` has been called again."""
        self.target = Target(bounds.slo_ttft_s, bounds.slo_tbt_s)

    def begin(self, model: ModelId, prompt_tokens: int, arrival_s: float) -> Timing:
        """A request was taken in."""
        return Timing(self._own.of(model), self.target_of(model), prompt_tokens, arrival_s)

    def refused(self, model: ModelId, code: str) -> None:
        """A request for a served model was not taken in."""
        _count(self._own.of(model), "failed", code)
        _count(self._own.of(model), "within", "neither")

    def responded(self, route: str, status: int) -> None:
        """An answer was begun."""
        statuses = self._own.responses.setdefault(route, {})
        statuses[str(status)] = statuses.get(str(status), 0) + 1

    def dropped(self, why: str) -> None:
        """What came was ended below the routes: refused with an error of this code, or closed."""
        counts = self._own.dropped
        counts[why] = counts.get(why, 0) + 1

    def was_hung(self) -> None:
        """The process before this one was ended because it did not answer."""
        self._own.hung += 1

    def follow_traces(self, count: Callable[[], dict[str, int]]) -> None:
        """Count what becomes of traces, as `count` tells since this process began."""
        self._traces = count

    def sums(self, is_kept: bool = False) -> Sums:
        """Return what the domain has counted: here by now, elsewhere as last published. Unless
        `is_kept`, it may change with the next token."""
        self._note_now()
        own = self._own
        if self._others or is_kept:
            sums = summed_up((own, *self._others.values()))
        else:
            sums = Sums(models=own.models, responses=own.responses, dropped=own.dropped)
            sums.traces, sums.proxies_hung = own.traces, own.hung
        sums.proxy_restarts = sum(p.starts - 1 for p in (self._own, *self._others.values()))
        sums.instances = self._instances
        return sums

    def cached(self) -> frozenset[ModelId]:
        """Return the models that a cache on the host holds whole."""
        return frozenset(model for one in self._instances.values() for model in one.cached)

    def made(self) -> dict[ModelId, int]:
        """Return how many tokens of each model have come."""
        return {model: one.generated_tokens for model, one in self.sums().models.items()}

    def recent(self, sums: Sums) -> dict[ModelId, Recent]:
        """Return what was counted of late, up to `sums`."""
        now = time.monotonic()
        began_s, earlier = self._window[0] if self._window else (now, sums.models)
        empty = ModelFigures()
        return {
            model: Recent(
                figures.ttft.minus(earlier.get(model, empty).ttft),
                figures.tbt.minus(earlier.get(model, empty).tbt),
                figures.generated_tokens - earlier.get(model, empty).generated_tokens,
                now - began_s,
            )
            for model, figures in sums.models.items()
        }

    def join(self, domain: Domain, address: str) -> None:
        """Publish from now on, for the proxy that receives at `address`. A supervised one goes on
        behind what the one before it counted. May block; raises StoreUnavailable."""
        self._board = domain.board()
        self._read()
        self._name, _, life = address.partition(".")
        name = self._name
        before = self._others.pop(name, None)
        if before is not None:
            before.starts += 1
            for model in self._own.models:
                before.of(model)
            self._own = before
            self._forget_removed()
        self._own.is_passing = not life

    async def tend(self, blocking: Blocking) -> None:
        """Publish our figures and read the others', if it is time to."""
        now = time.monotonic()
        if now < self._due_s:
            return
        self._due_s = now + INTERVAL_S
        if self._is_folded:
            self._begin_anew()
        try:
            await blocking(partial(self._exchange, self._record()))
        except AegaeonError as error:
            self._due_s = now + OUTAGE_S
            log.warning("figures not exchanged error=%s", error)

    async def leave(self, blocking: Blocking) -> None:
        """Publish for the last time."""
        self._due_s = 0.0
        await self.tend(blocking)
        await blocking(self._board.close)

    def _record(self) -> bytes:
        """Return what is to be published, and keep what has been counted so far."""
        now = time.monotonic()
        if not self._window or now - self._window[-1][0] >= WINDOW_STEP_S:
            self._window.append((now, self.sums(is_kept=True).models))
        self._note_now()
        self._own.beats += 1
        return encode_figures(self._own)

    def _exchange(self, record: bytes) -> None:
        self._board.publish(self._name, record)
        self._read()

    def _read(self) -> None:
        others, instances, now = dict(self._others), dict(self._instances), time.monotonic()
        records = self._board.read()
        self._heard = {name: heard for name, heard in self._heard.items() if name in records}
        for name, record in records.items():
            heard = self._heard.get(name, (b"", 0.0))
            if name == self._name or name.endswith(DEATHS):
                continue
            if heard[0] == record:
                is_proxy = name not in instances and not name.startswith((CLUSTER, FILES))
                if now - heard[1] > SILENT_S and is_proxy:
                    self._on_silent(name, others)
                continue
            try:
                figures = decode_figures(record)
            except AegaeonError as error:
                log.warning("figures not readable name=%s error=%s", name, error)
                continue
            self._heard[name] = record, now
            match figures:
                case ProxyFigures():
                    others[name] = figures
                case InstanceFigures():
                    instances[name] = figures
                case ClusterFigures():
                    self.cluster = figures
                case NodeFiles():
                    self.files = {**self.files, figures.node: figures}
        gone = others.get(GONE, ProxyFigures()).folded
        for name in gone:
            others.pop(name, None)
        self._is_folded = self._name in gone
        # Replaced as wholes: the loop may be reading them.
        self._others, self._instances = others, instances

    def _on_silent(self, name: str, others: dict[str, ProxyFigures]) -> None:
        """A proxy has ended. What it has counted is added, where nobody goes on behind it, to what
        all such have: or there would be more and more of them on the board."""
        if name in others:  # else it has been added, and is still there
            others[name] = silenced(others[name])
            if not others[name].is_passing:
                return

        def join(before: bytes | None, record: bytes) -> bytes:
            gone = None if before is None else decode_figures(before)
            ended = decode_figures(record)
            assert isinstance(ended, ProxyFigures) and isinstance(gone, ProxyFigures | None)
            return encode_figures(folded_up(gone, name, ended))

        if self._board.fold(name, GONE, join):
            log.info("figures of an ended proxy folded name=%s", name)

    def _begin_anew(self) -> None:
        """We were taken for dead, and what we had counted was folded: count from 0, renamed."""
        log.warning("figures begin anew name=%s", self._name)
        models = {model: ModelFigures() for model in self._own.models}
        self._own = ProxyFigures(starts=1, models=models, is_passing=True)
        self._name = f"{self._name}-{secrets.token_hex(2)}"
        self._is_folded = False
        self._window.clear()

    def _forget_removed(self) -> None:
        for model in self._targets:
            self._removed.pop(model, None)
        for model in self._own.models:
            if model not in self._targets:
                self._removed.setdefault(model)
        waiting = self._waiting(time.monotonic())
        for model in tuple(self._removed)[: max(0, len(self._removed) - MAX_REMOVED)]:
            if model not in waiting:
                del self._removed[model], self._own.models[model]
                for _, models in self._window:  # it may come again, and count from 0
                    models.pop(model, None)

    def _note_now(self) -> None:
        counted = self._traces()
        new = {what: count - self._seen_traces.get(what, 0) for what, count in counted.items()}
        if any(new.values()):
            self._own.traces, self._seen_traces = summed(self._own.traces, new), counted
        waiting = self._waiting(time.monotonic())
        for model, figures in self._own.models.items():
            figures.open, figures.oldest_wait_s = waiting.get(model, (0, 0.0))


def _count(figures: ModelFigures, kind: str, name: str) -> None:
    counts: dict[str, int] = getattr(figures, kind)
    counts[name] = counts.get(name, 0) + 1
