"""The engine that computes: models' weights and sequences' KV on one device, action by action."""

import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from aegaeon.device.base import Device
from aegaeon.engine.base import Engine, EngineUsage, check_request
from aegaeon.engine.batch import Part, build_batch, plan_passes
from aegaeon.engine.kv_place import KvPlace
from aegaeon.engine.sequence import Sequence
from aegaeon.engine.sequences import SequenceTable
from aegaeon.errors import (
    AegaeonError,
    CheckpointError,
    InvalidRequest,
    LoadCancelled,
    LoadStalled,
    WeightsEvicted,
)
from aegaeon.memory.costs import SwapCosts
from aegaeon.memory.kv import KvShape
from aegaeon.memory.traffic import Traffic
from aegaeon.memory.weights import ResidentModel, Weights
from aegaeon.types import (
    ComputeAction,
    Decode,
    Failure,
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


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Where an engine's bytes are, and what their moves have come to."""

    weights: Weights
    kv: KvPlace
    traffic: Traffic
    costs: SwapCosts


class ModelEngine(Engine):
    """Runs `specs` in `memory`.

    Prefill and Decode both feed whatever of a sequence is not cached and make its next token, so a
    sequence that lost its KV needs no special care. Who loses it: see SequenceTable.make_room;
    sequences of another model may be among the `preempted`.
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
        self._traffic = memory.traffic
        self._costs = memory.costs
        self._sequences = SequenceTable(memory.kv)
        self._wanted: Counter[ModelId] = Counter()  # sequences of each model
        self._lock = memory.kv.lock  # over _sequences, _kv and _wanted
        self._computing: ModelId | None = None  # the model of the running action
        self._computed_s = 0.0  # when the last one ended
        self._looked_up_tokens = 0  # of all sequences that began
        self._found_tokens = 0  # of these, that others had left

    def submit(self, request: Request) -> None:
        spec = self._checked(request)
        with self._lock:
            self._sequences.add(request, self._shapes[spec.id], spec.context_tokens)
            self._count(spec.id, 1)

    def release(self, request: RequestId) -> None:
        self._forget(request)

    def hand_over(self, request: RequestId) -> KvHandle:
        with self._lock:
            return self._sequences.hand_over(request)

    def adopt(self, request: Request, kv: KvHandle) -> None:
        spec = self._checked(request)
        with self._lock:
            self._sequences.adopt(request, self._shapes[spec.id], spec.context_tokens, kv)
            self._count(spec.id, 1)

    def execute(self, action: ComputeAction) -> Outcome:
        started = time.perf_counter()
        self._computing = action.model
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
        finally:
            self._computing = None
            self._computed_s = time.perf_counter()

    def load(self, action: Load) -> Outcome:
        started = time.perf_counter()
        assert self._computing not in action.evict, "a computing model stays"
        try:
            brought = self._weights.bring_in(action.model, action.evict)
            is_whole = self._weights.await_rest(action.model, self._is_at_rest)
        except LoadStalled as error:
            log.warning("load put off model=%s error=%s", action.model, error)
            return WeightsLost(action.model)
        except AegaeonError as error:
            self._weights.drop(action.model)
            return LoadFailed(action.model, error.code, str(error))
        except (OSError, MemoryError, RuntimeError) as error:
            # What torch and the system raise while weights come in is this model's trouble only.
            log.exception("loading failed model=%s", action.model)
            return LoadFailed(action.model, AegaeonError.code, f"cannot load: {error}")
        took_s = time.perf_counter() - started
        log.info(
            "model loaded model=%s bytes=%d took_s=%.3f", action.model, brought.weight_bytes, took_s
        )
        return Loaded(action.model, brought.weight_bytes, took_s, brought.evicted, is_whole)

    def usage(self) -> EngineUsage:
        return EngineUsage(
            weight_bytes=self._weights.used_bytes,
            weight_budget_bytes=self._weights.budget_bytes,
            kv_bytes=self._kv.pool.charged_bytes,
            kv_budget_bytes=self._kv.pool.budget_bytes,
            moved=self._traffic.totals(),
            looked_up_tokens=self._looked_up_tokens,
            found_tokens=self._found_tokens,
            evicted_blocks=self._kv.pool.evicted_blocks,
        )

    def close(self) -> None:
        with self._lock:
            self._sequences.clear()
        self._weights.close()
        self._kv.close()

    def _checked(self, request: Request) -> ModelSpec:
        spec = self._specs.get(request.model)
        if spec is None:
            raise InvalidRequest(f"no model {request.model!r} here; ask for a served one")
        check_request(request, spec)
        return spec

    def _is_at_rest(self) -> bool:
        """Whether no step is under way, nor one just behind another."""
        return self._computing is None and time.perf_counter() - self._computed_s > AT_REST_S

    def _forget(self, request: RequestId, is_poisoned: bool = False) -> None:
        with self._lock:
            removed = self._sequences.remove(request, is_poisoned)
            if removed is not None:
                self._count(removed.request.model, -1)

    def _count(self, model: ModelId, change: int) -> None:
        """Keep the weights' side informed which models are wanted here."""
        was_wanted = bool(self._wanted[model])
        self._wanted[model] += change
        if bool(self._wanted[model]) != was_wanted:
            self._weights.set_demand(model, not was_wanted)

    def _step(self, action: Prefill | Decode, model: ResidentModel, started: float) -> Stepped:
        with self._lock:
            wanted = [self._sequences.get(request) for request in action.requests]
            for sequence in wanted:
                sequence.begin(model.identity)
            ready, preempted = self._sequences.make_room(wanted)
            shortage = self._kv.shortage if preempted else ""
        ready = self._kv.await_any(ready)
        self._count_found(ready)
        missing = sum(sequence.tokens - sequence.cached for sequence in ready)
        tokens: list[NewToken] = []
        failed: list[Failure] = []
        for parts in plan_passes(ready):
            logits = model.forward(build_batch(parts, self._kv.pool))
            for part in parts:
                part.sequence.cached = part.stop
            last = [part for part in parts if part.is_last]
            self._take_tokens(last, logits, tokens, failed)
        took_s = time.perf_counter() - started
        if isinstance(action, Prefill):
            self._costs.note_prefill(action.model, missing, took_s)
        return Stepped(
            action.model, tuple(tokens), took_s, tuple(preempted), tuple(failed), shortage
        )

    def _count_found(self, sequences: list[Sequence]) -> None:
        """Count those that begin: of the others more is cached than they have found."""
        if not self._kv.prefixes.is_on:
            return
        for sequence in sequences:
            if sequence.cached == sequence.found:
                self._looked_up_tokens += sequence.tokens
                self._found_tokens += sequence.found

    def _publish(self, sequence: Sequence) -> None:
        """Its logits are finite, so its keys and values are: others may begin with them."""
        sequence.found = 0
        sequence.sound = sequence.cached
        if sequence.whole_blocks > len(sequence.held.shares):
            with self._lock:
                self._kv.prefixes.publish(
                    sequence.shape, sequence.chain, sequence.held, sequence.whole_blocks
                )

    def _take_tokens(
        self, parts: list[Part], logits: Tensor, tokens: list[NewToken], failed: list[Failure]
    ) -> None:
        sequences = [part.sequence for part in parts]
        draws = [(one.request.sampling, len(one.generated)) for one in sequences]
        drawn = self._device.sample(logits, draws)
        for sequence, token_id in zip(sequences, drawn, strict=True):
            request, found = sequence.request, sequence.found
            if token_id is None:
                message = f"{request.model} made logits that are not finite; the request ends"
                failed.append((request.id, AegaeonError.code, message))
                self._forget(request.id, is_poisoned=True)
                continue
            self._publish(sequence)
            reason = sequence.append(token_id)
            tokens.append(NewToken(request.id, token_id, reason, found))
            if reason is not None:
                self.release(request.id)
