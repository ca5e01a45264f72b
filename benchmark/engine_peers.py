"""The peers of benchmark/engine.py: transformers in this process, llama.cpp's programs on PATH."""

import json
import shutil
import subprocess
import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Protocol

import torch

from aegaeon.types import ModelSpec
from benchmark.engine_cases import Case
from benchmark.report_rows import progress

LLAMA = "llama.cpp"
PATIENCE_S = 600.0
# Prompts of other contexts would have to be computed first, for minutes.
LLAMA_CONTEXT = 16
LLAMA_STEPS = 16
MOST_KV_BYTES = 2 << 30  # that transformers holds: it copies all of it in each step
PROBE_TOKENS = 32


class Peer(Protocol):
    """Another engine with the same model."""

    name: str

    def tokens_per_s(self, case: Case) -> float | None:
        """Run a case once; None: not measured here."""


class Transformers:
    """The reference implementation, in the type that is the faster for prompts, and for steps."""

    name = "transformers"

    def __init__(self, spec: ModelSpec, threads: int) -> None:
        """Load it in each type and see which is the faster."""
        self._spec, self._threads = spec, threads
        self._models: dict[str, Any] = {}
        self._best: dict[str, str] = {}
        self._cached: tuple[Case, str] | None = None
        self._cache: Any = None
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            self._models[name] = _load(spec.path, dtype)
        for case in (Case("prefill", PROBE_TOKENS), Case("decode", PROBE_TOKENS)):
            rates = {}
            for name in self._models:
                self._best[case.kind] = name
                self.tokens_per_s(case)
                rates[name] = self.tokens_per_s(case) or 0.0
            self._best[case.kind] = max(rates, key=lambda name: rates[name])
        for name in set(self._models) - set(self._best.values()):
            del self._models[name]
        told = ", ".join(f"{kind} in {name}" for kind, name in self._best.items())
        progress(f"  transformers: {told}")

    def tokens_per_s(self, case: Case) -> float | None:
        """Run a prompt, or a step on a cache of random keys and values."""
        if case.kind == "decode" and self._cache_bytes(case) > MOST_KV_BYTES:
            return None
        dtype = self._best[case.kind]
        model = self._models[dtype]
        if case.kind == "decode" and self._cached != (case, dtype):
            self._cached, self._cache = (case, dtype), _random_cache(model, case)
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                run = self._prefill if case.kind == "prefill" else self._step
                return run(model, case)
        finally:
            torch.set_num_threads(before)

    def _cache_bytes(self, case: Case) -> int:
        return 2 * case.batch * case.tokens * self._spec.kv_token_bytes  # old and new

    def _prefill(self, model: Any, case: Case) -> float:
        ids = torch.arange(case.tokens)[None] % 1000
        start = time.perf_counter()
        model(ids, logits_to_keep=1)
        return case.tokens / (time.perf_counter() - start)

    def _step(self, model: Any, case: Case) -> float:
        ids = torch.ones(case.batch, 1, dtype=torch.int64)
        start = time.perf_counter()
        model(ids, past_key_values=self._cache, logits_to_keep=1)
        return case.batch / (time.perf_counter() - start)


def _load(path: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415  # takes seconds

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model.eval()


def _random_cache(model: Any, case: Case) -> Any:
    from transformers import DynamicCache  # noqa: PLC0415  # as above

    config = model.config
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    shape = (case.batch, config.num_key_value_heads, case.tokens - 1, head_dim)
    cache = DynamicCache()
    for layer in range(config.num_hidden_layers):
        keys, values = (torch.rand(shape).to(model.dtype) - 0.5 for _ in range(2))
        cache.update(keys, values, layer)
    return cache


class Llama:
    """llama-bench, and llama-batched-bench for batches, with one GGUF file."""

    def __init__(self, gguf: str, threads: int) -> None:
        """`gguf` has the same shape and type of weights."""
        self.name = LLAMA
        self._flags = ["-m", gguf, "-t", str(threads)]

    def tokens_per_s(self, case: Case) -> float | None:
        """Run the program once: prompts, single sequences at any context, batches at a short one.

        Raises SystemExit where it fails.
        """
        if case.kind == "prefill":
            return self._bench("-p", str(case.tokens), "-n", "0")
        if case.batch == 1:
            depth = ["-d", str(case.tokens)] if case.tokens > LLAMA_CONTEXT else []
            return self._bench("-p", "0", "-n", str(LLAMA_STEPS), *depth)
        if case.tokens > LLAMA_CONTEXT or not shutil.which("llama-batched-bench"):
            return None
        return self._batched(case)

    def _bench(self, *flags: str) -> float:
        command = ["llama-bench", *self._flags, "-r", "1", "-o", "json", *flags]
        return float(json.loads(_output(command))[0]["avg_ts"])

    def _batched(self, case: Case) -> float:
        tokens = case.batch * (case.tokens + LLAMA_STEPS)
        flags = ["-npp", str(case.tokens), "-ntg", str(LLAMA_STEPS), "-npl", str(case.batch)]
        command = ["llama-batched-bench", *self._flags, "-c", str(tokens + 64), *flags]
        lines = _output([*command, "--output-format", "jsonl"]).splitlines()
        return float(next(json.loads(line) for line in lines if line.startswith("{"))["speed_tg"])


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} has failed: {done.stderr.strip()[-500:]}")
    return done.stdout


def find_transformers(spec: ModelSpec, threads: int) -> tuple[list[Peer], list[str]]:
    """Return transformers with the model, or why it is not here."""
    if find_spec("transformers"):
        return [Transformers(spec, threads)], []
    return [], ["transformers: not installed"]


def find_llama(gguf: str, threads: int) -> tuple[list[Peer], list[str]]:
    """Return llama.cpp with the model in `gguf`, or why it is not here."""
    if not shutil.which("llama-bench"):
        return [], [f"{LLAMA}: no llama-bench on PATH"]
    if not gguf:
        return [], [f"{LLAMA}: no GGUF file of these weights was named"]
    return [Llama(gguf, threads)], []
