"""The engine that computes: models' weights and sequences' KV on one device, action by action."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch

from aegaeon.device.base import Device
from aegaeon.engine.base import Engine, EngineUsage, check_request
from aegaeon.engine.batch import Part, build_batch, plan_passes
from aegaeon.engine.sampling import Logits, pick_token
from aegaeon.engine.sequences import Sequence, SequenceTable
from aegaeon.engine.threads import ComputeThreads
from aegaeon.errors import AegaeonError, InvalidRequest
from aegaeon.memory.budget import Budgets
from aegaeon.memory.kv import KvPool, KvShape
from aegaeon.memory.weights import Loader, ResidentModel, Weights
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
)

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Failure = tuple[RequestId, str, str]


class ModelEngine(Engine):
    """Runs `specs` on `device` inside `budgets`, with at most `threads` compute threads.

    Prefill and Decode both feed whatever of a sequence is not cached and make its next token, so a
    sequence that lost its KV needs no special care. Who loses it: see SequenceTable.make_room;
    sequences of another model may be among the `preempted`.

    For the thread bound to hold for the libraries' own pools too, the process is started with
    OMP_NUM_THREADS, MKL_NUM_THREADS and OPENBLAS_NUM_THREADS equal to `threads`.
    """

    def __init__(
        self,
        specs: tuple[ModelSpec, ...],
        shapes: Mapping[ModelId, KvShape],
        device: Device,
        budgets: Budgets,
        loader: Loader,
        pool: KvPool | None = None,
    ) -> None:
        """`pool` is the node's, to hand KV over by; closed with the engine. None: a private one."""
        self._specs = {spec.id: spec for spec in specs}
        self._shapes = dict(shapes)
        self._threads = ComputeThreads(budgets.threads)
        self._weights = Weights(budgets.weight_bytes, device, loader)
        self._pool = pool or KvPool(budgets.kv_bytes, self._shapes.values())
        self._sequences = SequenceTable(self._pool)
        self._lock = threading.Lock()  # over _sequences and _pool
        self._computing: ModelId | None = None  # the model of the running action
        self._prepared: set[ModelId] = set()  # the loading thread's

    def submit(self, request: Request) -> None:
        spec = self._checked(request)
        with self._lock:
            self._sequences.add(request, self._shapes[spec.id], spec.context_tokens)

    def release(self, request: RequestId) -> None:
        with self._lock:
            self._sequences.remove(request)

    def hand_over(self, request: RequestId) -> KvHandle:
        with self._lock:
            return self._sequences.hand_over(request)

    def adopt(self, request: Request, kv: KvHandle) -> None:
        spec = self._checked(request)
        with self._lock:
            self._sequences.adopt(request, self._shapes[spec.id], spec.context_tokens, kv)

    def execute(self, action: ComputeAction) -> Outcome:
        started = time.perf_counter()
        model = self._weights.get(action.model)
        if model is None:
            raise RuntimeError(f"{action} of a model that is not resident")
        self._computing = action.model
        try:
            match action:
                case Switch(model=name):
                    return Switched(name, time.perf_counter() - started)
                case Prefill(requests=requests) | Decode(requests=requests):
                    return self._compute(lambda: self._step(action.model, model, requests, started))
        finally:
            self._computing = None

    def load(self, action: Load) -> Outcome:
        started = time.perf_counter()
        assert self._computing not in action.evict, "a computing model stays"
        self._threads.enter_loading()
        try:
            for model in action.evict:
                self._weights.evict(model)
            with torch.inference_mode():
                weight_bytes = self._weights.load(self._specs[action.model])
            self._prepare(action.model)
        except AegaeonError as error:
            self._weights.evict(action.model)
            return LoadFailed(action.model, error.code, str(error))
        except (OSError, MemoryError, RuntimeError) as error:
            # What torch and the system raise while weights come in is this model's trouble only.
            log.exception("loading failed model=%s", action.model)
            self._weights.evict(action.model)
            return LoadFailed(action.model, AegaeonError.code, f"cannot load: {error}")
        took_s = time.perf_counter() - started
        log.info("model loaded model=%s bytes=%d took_s=%.3f", action.model, weight_bytes, took_s)
        return Loaded(action.model, weight_bytes, took_s)

    def usage(self) -> EngineUsage:
        return EngineUsage(
            weight_bytes=self._weights.used_bytes,
            weight_budget_bytes=self._weights.budget_bytes,
            kv_bytes=self._pool.used_bytes,
            kv_budget_bytes=self._pool.budget_bytes,
        )

    def close(self) -> None:
        with self._lock:
            self._sequences.clear()
        self._pool.close()
        self._weights.clear()

    def _checked(self, request: Request) -> ModelSpec:
        spec = self._specs.get(request.model)
        if spec is None:
            raise InvalidRequest(f"no model {request.model!r} here; ask for a served one")
        check_request(request, spec)
        return spec

    def _prepare(self, name: ModelId) -> None:
        """Prepare a model when it is loaded for the first time, computing as its steps will.

        On a thread of its own, for the compute threads that OpenMP gives a thread end with it.
        """
        model = self._weights.get(name)
        if model is None or name in self._prepared:
            return
        with ThreadPoolExecutor(1, "prepare") as thread:
            thread.submit(self._compute, model.prepare).result()
        self._prepared.add(name)

    def _compute(self, work: Callable[[], Result]) -> Result:
        with self._threads.computing(), torch.inference_mode():
            return work()

    def _step(
        self, name: ModelId, model: ResidentModel, requests: tuple[RequestId, ...], started: float
    ) -> Stepped:
        with self._lock:
            wanted = [self._sequences.get(request) for request in requests]
            ready, preempted = self._sequences.make_room(wanted)
        tokens: list[NewToken] = []
        failed: list[Failure] = []
        for parts in plan_passes(ready):
            logits = model.forward(build_batch(parts, self._pool)).numpy()
            for part in parts:
                part.sequence.cached = part.stop
            last = [part for part in parts if part.is_last]
            self._take_tokens(last, logits, tokens, failed)
        took_s = time.perf_counter() - started
        return Stepped(name, tuple(tokens), took_s, tuple(preempted), tuple(failed))

    def _take_tokens(
        self, parts: list[Part], logits: Logits, tokens: list[NewToken], failed: list[Failure]
    ) -> None:
        for part, row in zip(parts, logits, strict=True):
            sequence = part.sequence
            request = sequence.request
            if not np.isfinite(row).all():
                message = f"{request.model} made logits that are not finite; the request ends"
                failed.append((request.id, AegaeonError.code, message))
                with self._lock:
                    self._sequences.remove(request.id, is_poisoned=True)
                continue
            token_id = pick_token(row, request.sampling, len(sequence.generated))
            reason = sequence.append(token_id)
            tokens.append(NewToken(request.id, token_id, reason))
            if reason is not None:
                self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        with self._lock:
            self._sequences.remove(sequence.request.id)
