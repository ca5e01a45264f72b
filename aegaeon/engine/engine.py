"""The engine that computes: models' weights and sequences' KV on one device, action by action."""

import logging
import time
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from aegaeon.device.base import Change, Device
from aegaeon.engine.base import Engine, EngineUsage, check_request
from aegaeon.engine.batch import Part, build_batch, plan_passes
from aegaeon.engine.constraints import Constraint
from aegaeon.engine.drawing import (
    adjustment_of,
    change_of,
    draw_tokens,
    finite_rows,
    leave_out_slow,
    score_prompt,
    split_late,
    split_logits,
)
from aegaeon.engine.exchange import KvExchange, Room
from aegaeon.engine.grammar_client import GrammarHost
from aegaeon.engine.kv_bytes import KvBytes
from aegaeon.engine.made import Made
from aegaeon.engine.memory import EngineMemory
from aegaeon.engine.sequence import Sequence
from aegaeon.engine.sequences import SequenceTable
from aegaeon.errors import (
    AegaeonError,
    CheckpointError,
    ConfigError,
    DeviceLost,
    InvalidRequest,
    LoadCancelled,
    LoadStalled,
    WeightsEvicted,
)
from aegaeon.memory.kv import KvShape
from aegaeon.memory.weights import ResidentModel
from aegaeon.types import (
    ComputeAction,
    Decode,
    KvHandle,
    Load,
    Loaded,
    LoadFailed,
    ModelId,
    ModelSpec,
    NewToken,
    Outcome,
    Prefill,
    Request,
    RequestId,
    Stepped,
    Switch,
    Switched,
    WeightsLost,
)

log = logging.getLogger(__name__)

# Between two steps of a turn passes less.
AT_REST_S = 0.02


class ModelEngine(Engine):
    """Runs `specs` in `memory`.

    Prefill and Decode both feed whatever of a sequence is not cached, or a Prefill a piece of it,
    and make its next token, so one that lost its KV needs no special care. Who loses it: see
    SequenceTable.make_room; sequences of another model may be among the `preempted`.
    """

    def __init__(
        self,
        specs: tuple[ModelSpec, ...],
        shapes: Mapping[ModelId, KvShape],
        memory: EngineMemory,
        device: Device,
    ) -> None:
        """Take over `memory`; `device` draws the tokens."""
        self._specs = {spec.id: spec for spec in specs}
        self._shapes = dict(shapes)
        self._device = device
        self._weights = memory.weights
        self._kv = memory.kv
        self._shelf = memory.shelf
        self._traffic = memory.traffic
        self._costs = memory.costs
        self._evictions = memory.evictions
        self._passes = 0
        self._sequences = SequenceTable(memory.kv)
        self._wanted: Counter[ModelId] = Counter()  # sequences of each model
        self._grammars = GrammarHost()
        self._lock = memory.kv.lock  # over _sequences, _kv and _wanted
        self._exchange = KvBytes(self._sequences, self._kv, self._shapes, self._lock)
        self._computing: ModelId | None = None  # the model of the running action
        self._computed_s = 0.0  # when the last one ended
        self._identities: dict[ModelId, bytes] = {}  # what ran each last: what is kept is of that
        self._looked_up_tokens = 0  # of all sequences that began
        self._found_tokens = 0  # of these, that others had left

    def submit(self, request: Request) -> None:
        spec = self._checked(request)
        with self._lock:
            sequence = self._sequences.add(request, self._shapes[spec.id], spec.context_tokens)
            self._count(spec.id, 1)
        self._begin(sequence)

    def known_tokens(self, request: RequestId) -> int:
        sequence = self._sequences.find(request)
        if sequence is None or not self._kv.prefixes.is_on:
            return 0
        with self._lock:
            identity = self._identities.get(sequence.request.model)
            if identity is not None:
                sequence.begin(identity)
            return self._kv.known_tokens(sequence)

    def release(self, request: RequestId) -> None:
        self._forget(request)

    def set_apart(self, request: RequestId) -> None:
        with self._lock:
            self._sequences.set_apart(request)

    def hand_over(self, request: RequestId, by_host: bool = False) -> KvHandle:
        with self._lock:
            return self._sequences.hand_over(request, by_host)

    def resume(self, request: RequestId) -> bool:
        with self._lock:
            return self._sequences.resume(request)

    @property
    def exchange(self) -> KvExchange:
        return self._exchange

    def adopt(self, request: Request, kv: KvHandle, room: Room | None = None) -> None:
        spec = self._checked(request)
        brought = None if room is None else room.blocks
        with self._lock:
            self._sequences.adopt(request, spec, self._shapes[spec.id], kv, brought)
            self._count(spec.id, 1)
            sequence = self._sequences.get(request.id)
        self._begin(sequence)

    def execute(self, action: ComputeAction) -> Outcome:
        self._computing, started = action.model, time.perf_counter()
        try:
            with self._weights.use(action.model) as model:
                match action:
                    case Switch(model=name):
                        with self._lock:
                            self._sequences.begin_turn(name)
                        return Switched(name, time.perf_counter() - started)
                    case Prefill() | Decode():
                        with torch.inference_mode():
                            return self._step(action, model, started)
        except (WeightsEvicted, LoadCancelled) as error:
            log.info("weights lost model=%s error=%s", action.model, error)
            return WeightsLost(action.model)
        except CheckpointError as error:
            # Loading goes on while the first layers compute: this is its failure.
            self._weights.drop(action.model)
            return LoadFailed(action.model, error.code, str(error))
        except RuntimeError:
            self._device.check()  # torch and kernels tell of a lost device in words of their own
            raise
        finally:
            self._computing = None
            self._computed_s = time.perf_counter()

    def load(self, action: Load) -> Outcome:
        started = time.perf_counter()
        assert self._computing not in action.evict, "a computing model stays"
        try:
            brought = self._weights.bring_in(action.model, action.evict)
            is_whole = self._weights.await_rest(action.model, self._is_at_rest)
        except DeviceLost:
            raise  # this model's trouble is everybody's
        except LoadStalled as error:
            log.warning("load put off model=%s error=%s", action.model, error)
            return WeightsLost(action.model)
        except AegaeonError as error:
            self._weights.drop(action.model)
            return LoadFailed(action.model, error.code, str(error))
        except (OSError, MemoryError, RuntimeError) as error:
            # What torch and the system raise while weights come in is this model's trouble only,
            # unless the device is lost.
            self._device.check()
            log.exception("loading failed model=%s", action.model)
            return LoadFailed(action.model, AegaeonError.code, f"cannot load: {error}")
        took_s, size = time.perf_counter() - started, brought.weight_bytes
        log.info("model loaded model=%s bytes=%d took_s=%.3f", action.model, size, took_s)
        return Loaded(action.model, brought.weight_bytes, took_s, brought.evicted, is_whole)

    def begin_model(self, spec: ModelSpec) -> None:
        if self._shelf is None:
            raise ConfigError("this engine's models were chosen when it was opened; open another")
        self._shapes[spec.id] = self._shelf.put(spec)
        self._specs[spec.id] = spec

    def end_model(self, model: ModelId) -> None:
        if self._shelf is None or self._specs.pop(model, None) is None:
            return
        self._weights.drop(model)
        self._shelf.take(model)
        del self._shapes[model]
        self._identities.pop(model, None)

    def let_go(self, model: ModelId, idle_s: float | None) -> None:
        self._weights.drop(model)
        if self._shelf is not None and idle_s is not None:
            self._shelf.source.let_go(model, idle_s)

    def usage(self) -> EngineUsage:
        evictions = self._evictions
        return EngineUsage(
            weight_bytes=self._weights.used_bytes,
            weight_budget_bytes=self._weights.budget_bytes,
            kv_bytes=self._kv.pool.charged_bytes,
            kv_budget_bytes=self._kv.pool.budget_bytes,
            moved=self._traffic.totals(),
            cached=() if evictions is None else evictions.held,
            coming={} if evictions is None else evictions.coming,
            evicted={} if evictions is None else evictions.counts,
            passes=self._passes,
            looked_up_tokens=self._looked_up_tokens,
            found_tokens=self._found_tokens,
            evicted_blocks=self._kv.pool.evicted_blocks,
            stage_bytes=0 if self._shelf is None else self._shelf.budgets.stage_bytes,
            grammar_host_bytes=self._grammars.resident_bytes(),
        )

    def close(self) -> None:
        with self._lock:
            self._sequences.clear()
        self._grammars.close()
        self._weights.close()
        self._kv.close()

    def _checked(self, request: Request) -> ModelSpec:
        spec = self._specs.get(request.model)
        if spec is None:
            raise InvalidRequest(f"no model {request.model!r} here; ask for a served one")
        check_request(request, spec)
        return spec

    def _begin(self, sequence: Sequence) -> None:
        """Prepare how the tokens of a new sequence are drawn."""
        request = sequence.request
        sequence.adjustment = adjustment_of(request)
        if request.sampling.grammar:
            spec = self._specs[request.model]
            sequence.constraint = Constraint(self._grammars, spec, request, sequence.generated)

    def _is_at_rest(self) -> bool:
        """Whether no step is under way, nor one just behind another."""
        return self._computing is None and time.perf_counter() - self._computed_s > AT_REST_S

    def _forget(self, request: RequestId, is_poisoned: bool = False) -> None:
        with self._lock:
            removed = self._sequences.remove(request, is_poisoned)
            if removed is not None:
                self._count(removed.request.model, -1)
        if removed is not None and removed.constraint is not None:
            removed.constraint.close()

    def _count(self, model: ModelId, change: int) -> None:
        """Keep the weights' side informed which models are wanted here."""
        was_wanted = bool(self._wanted[model])
        self._wanted[model] += change
        if bool(self._wanted[model]) != was_wanted:
            self._weights.set_demand(model, not was_wanted)

    def _step(self, action: Prefill | Decode, model: ResidentModel, started: float) -> Stepped:
        ready, preempted, shortage = self._prepare(action, model)
        starts = [(sequence, sequence.cached) for sequence in ready]
        prefill = action if isinstance(action, Prefill) else None
        # A whole prompt without a token waits for its grammar, as one that has not begun.
        is_piece = prefill is not None and prefill.max_tokens is not None
        passes = plan_passes(ready, shares=prefill.shares if prefill is not None else list)
        self._count_found(passes)
        is_scoring = not all(sequence.is_scored for sequence in ready)
        made = Made()
        for parts in passes:
            logits = model.forward(build_batch(parts, self._kv.pool))
            self._passes += 1
            for part in parts:
                part.sequence.cached, part.sequence.is_unsure = part.stop, True
            self._take_logits(parts, logits, made)
            del logits  # a view of memory that the next pass may need more of
        for request, is_poisoned in made.lost.items():
            self._forget(request, is_poisoned)
        took_s = time.perf_counter() - started
        if prefill is not None and not is_scoring:
            fed = sum(part.stop - part.start for parts in passes for part in parts)
            self._costs.note_prefill(action.model, fed, took_s)
        return Stepped(
            model=action.model,
            tokens=tuple(made.tokens),
            took_s=took_s,
            preempted=preempted,
            failed=tuple(made.failed),
            shortage=shortage,
            scores=tuple(made.scores),
            begun=made.begun(starts) if is_piece else (),
        )

    def _prepare(
        self, action: Prefill | Decode, model: ResidentModel
    ) -> tuple[list[Sequence], tuple[RequestId, ...], str]:
        """Return the sequences with room for all their tokens and their KV in place, those that
        lost theirs, and for want of what."""
        self._identities[action.model] = model.identity
        with self._lock:
            wanted = [self._sequences.get(request) for request in action.requests]
            for sequence in wanted:
                sequence.begin(model.identity)
            ready, preempted = self._sequences.make_room(wanted)
            shortage = self._kv.shortage if preempted else ""
        return leave_out_slow(self._kv.await_any(ready)), tuple(preempted), shortage

    def _count_found(self, passes: list[list[Part]]) -> None:
        """Count those that begin: of the others more is cached than they have found."""
        if not self._kv.prefixes.is_on:
            return
        for part in (part for parts in passes for part in parts):
            sequence = part.sequence
            if part.start == sequence.cached == sequence.found:
                self._looked_up_tokens += sequence.tokens
                self._found_tokens += sequence.found

    def _publish(self, sequence: Sequence) -> None:
        """Its logits are finite, so its keys and values are: others may begin with them."""
        sequence.sound, sequence.is_unsure = sequence.cached, False
        count, held = sequence.whole_blocks, sequence.held
        if count > len(held.shares):
            with self._lock:
                self._kv.prefixes.publish(sequence.shape, sequence.chain, held, count)

    def _take_logits(self, parts: list[Part], logits: Tensor, made: Made) -> None:
        """Make of a pass's logits what its parts want of them."""
        logits, scored = split_logits(self._device, parts, logits)
        for part, rows in scored:
            scores = score_prompt(self._device, part, rows)
            if scores is None:
                made.fail(part.sequence)
                continue
            made.scores.append(scores)
            part.sequence.scored = part.scored.stop + 1
            if part.is_end and not part.is_last:
                self._publish(part.sequence)
        self._draw([part for part in parts if part.ends_in_row], logits, made)

    def _draw(self, parts: list[Part], logits: Tensor, made: Made) -> None:
        """Make the next tokens of the parts' sequences, each of its row of `logits`."""
        rows: list[int] = []
        drawing: list[Sequence] = []
        changes: list[Change | None] = []
        late = split_late(parts)
        for row, part in enumerate(parts):
            if late[row]:
                # Its last token is fed again, once it is known what may come.
                part.sequence.cached -= part.is_last
                continue
            try:
                changes.append(change_of(part.sequence))
            except AegaeonError as error:
                made.fail(part.sequence, error)
                continue
            rows.append(row)
            drawing.append(part.sequence)
        for row in finite_rows(self._device, logits, late):
            if parts[row].sequence.request.id not in made.lost:
                self._publish(parts[row].sequence)
        if len(rows) < len(parts):
            logits = self._device.select(logits, rows)
        drawn = draw_tokens(self._device, drawing, logits, changes)
        for sequence, (token_id, log_probs) in zip(drawing, drawn, strict=True):
            if token_id is None:
                made.fail(sequence)
            if token_id is None or sequence.request.id in made.lost:
                continue
            found, sequence.found = sequence.found, 0
            self._publish(sequence)
            reason = sequence.append(token_id)
            made.tokens.append(NewToken(sequence.request.id, token_id, reason, log_probs, found))
            if reason is not None:
                self.release(sequence.request.id)
