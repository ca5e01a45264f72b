"""An engine on regions of its own, driven action by action, and a clock on its first operator."""

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from torch import Tensor

from aegaeon.config import Settings
from aegaeon.device.cpu import CpuDevice
from aegaeon.device.cuda_step import CudaRunner
from aegaeon.engine.open import open_engine
from aegaeon.engine.regions import Regions
from aegaeon.measures import Phase
from aegaeon.sampling import SamplingParams
from aegaeon.types import (
    ComputeAction,
    Decode,
    KvHandle,
    Load,
    Loaded,
    ModelId,
    ModelSpec,
    Prefill,
    Request,
    Stepped,
    Switch,
    Switched,
)
from benchmark.cold_loads import remove_region

SHARED_MEMORY = Path("/dev/shm")
LOOK_S = 0.0005
PATIENCE_S = 120.0
PROMPT_IDS = 1000  # that prompts are made of; every vocabulary has them


def region_of(kind: str) -> str:
    """Return a path for a region of this process."""
    return str(SHARED_MEMORY / f"aegaeon-benchmark-{os.getpid()}.{kind}")


class Incoming(NamedTuple):
    """A model that is being loaded."""

    loaded: Future[None]  # the first layers are in: the device may switch to it
    arrived: Future[float]  # all is in, since then by perf_counter


class Driver:
    """Runs one engine as an instance would. Each verb raises SystemExit when the engine fails."""

    def __init__(
        self, settings: Settings, specs: Sequence[ModelSpec], prefix_cache: bool = False
    ) -> None:
        """Open it, with nothing in the caches. Without `prefix_cache` prompts are run whole, though
        all are alike."""
        self.regions = Regions(region_of("weights"), region_of("kv"))
        chosen = msgspec.structs.replace(settings, prefix_cache=prefix_cache)
        self.engine = open_engine(chosen, tuple(specs), self.regions)
        self._copy_lane = ThreadPoolExecutor(1)  # one thread makes all loads, as in an instance
        self._requests = 0

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *_: object) -> None:
        self._copy_lane.shutdown()
        self.engine.close()
        for region in (self.regions.weights, self.regions.kv):
            remove_region(Path(region))

    def await_memory(self, weight_bytes: int) -> None:
        """Wait until memory for a model of so many bytes is ready, as an idle server has it."""
        spare = Path(f"{self.regions.weights}+spare")
        ends_s = time.monotonic() + PATIENCE_S
        while not spare.exists() or spare.stat().st_blocks * 512 < weight_bytes:
            if time.monotonic() > ends_s:
                raise SystemExit(f"{spare} was not made ready")
            time.sleep(LOOK_S)

    def load(self, model: ModelId, *evict: ModelId) -> None:
        """Load weights, until the first layers are in."""
        self._copy_lane.submit(self._load, model, *evict).result()

    def bring_in(self, spec: ModelSpec) -> Incoming:
        """Load beside whatever else is done."""
        stop = self.moved_bytes("weights") + spec.weight_bytes
        loaded = self._copy_lane.submit(self._load, spec.id)
        return Incoming(loaded, self._copy_lane.submit(self.await_moved, "weights", stop))

    def submit(self, model: ModelId, prompt_tokens: int, max_tokens: int) -> str:
        """Make a request known and return its id."""
        request = self._request(model, prompt_tokens, max_tokens)
        self.engine.submit(request)
        return request.id

    def submit_ids(self, model: ModelId, token_ids: Sequence[int], max_tokens: int) -> str:
        """Make a request with this prompt known and return its id."""
        request = self._request(model, 0, max_tokens)
        self.engine.submit(msgspec.structs.replace(request, prompt_token_ids=tuple(token_ids)))
        return request.id

    def adopt(self, model: ModelId, prompt_tokens: int, max_tokens: int, kv: KvHandle) -> str:
        """Make a request known with the KV of another client of the pool; return its id."""
        request = self._request(model, prompt_tokens, max_tokens)
        self.engine.adopt(request, kv)
        return request.id

    def _request(self, model: ModelId, prompt_tokens: int, max_tokens: int) -> Request:
        self._requests += 1
        return Request(
            id=f"request-{self._requests}",
            model=model,
            prompt_token_ids=tuple(1 + at % PROMPT_IDS for at in range(prompt_tokens)),
            sampling=SamplingParams(temperature=0.0),
            max_tokens=max_tokens,
            stop_token_ids=(),
            reply_to="",
            arrival_s=0.0,
            deadline_s=float("inf"),
        )

    def release(self, request: str) -> None:
        """Forget a request."""
        self.engine.release(request)

    def execute(self, action: ComputeAction) -> float:
        """Execute an action and return its seconds."""
        start = time.perf_counter()
        outcome = self.engine.execute(action)
        took_s = time.perf_counter() - start
        if not isinstance(outcome, Stepped | Switched):
            raise SystemExit(f"{action} has failed: {outcome}")
        return took_s

    def switch(self, model: ModelId) -> float:
        """Give the device to a model; return the seconds."""
        return self.execute(Switch(model))

    def prefill(self, model: ModelId, request: str) -> float:
        """Make a request's first token; return the seconds."""
        return self.execute(Prefill(model, (request,)))

    def decode(self, model: ModelId, *requests: str) -> float:
        """Make the next token of each request; return the seconds."""
        return self.execute(Decode(model, requests))

    def moved_bytes(self, phase: Phase) -> int:
        """Bytes of the copies that have ended."""
        return self.engine.usage().moved[phase].moved_bytes

    def await_moved(self, phase: Phase, moved_bytes: int) -> float:
        """Wait until as many bytes have moved since the start; return when that was seen."""
        give_up_s = time.perf_counter() + PATIENCE_S
        while self.moved_bytes(phase) < moved_bytes:
            if time.perf_counter() > give_up_s:
                raise SystemExit(f"{phase} took more than {PATIENCE_S:.0f} s")
            time.sleep(LOOK_S)
        return time.perf_counter()

    def _load(self, model: ModelId, *evict: ModelId) -> None:
        outcome = self.engine.load(Load(model, evict))
        if not isinstance(outcome, Loaded):
            raise SystemExit(f"{model} could not be loaded: {outcome}")


class FirstOperator:
    """When a forward pass last began with its first operator, in seconds of perf_counter."""

    began_s = 0.0


@contextmanager
def first_operator(device: str = "cpu") -> Iterator[FirstOperator]:
    """Note when what computes on `device` embeds; where that is a CUDA device, begins its step."""
    owner: type = CudaRunner if device.startswith("cuda") else CpuDevice
    name = "run_tokens" if owner is CudaRunner else "embed"
    seen, begin = FirstOperator(), getattr(owner, name)

    def noted(*given: Any) -> Tensor:
        seen.began_s = time.perf_counter()
        made: Tensor = begin(*given)
        return made

    setattr(owner, name, noted)
    try:
        yield seen
    finally:
        setattr(owner, name, begin)
