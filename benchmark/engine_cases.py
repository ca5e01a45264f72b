"""What benchmark/engine.py measures, on our engine: prefill, and decode in batches at contexts."""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import torch

from aegaeon import _native
from aegaeon.config import Settings
from aegaeon.engine.kv_place import layout_of
from aegaeon.memory.budget import GB, choose_budgets
from aegaeon.memory.kv import BLOCK_TOKENS, KvPool, KvShape, blocks_for
from aegaeon.models.config import ModelConfig, read_config
from aegaeon.models.references import resolve_all
from aegaeon.types import KvHandle, ModelSpec
from benchmark.limits import Limits
from benchmark.switch_engine import Driver

# Of what the system has available, that keys and values of a case may take.
KV_SHARE = 0.4
SPARE_TOKENS = 256  # that sequences may grow by while they are measured


class Case(msgspec.Struct, frozen=True):
    """A prompt of `tokens`, or a step of `batch` sequences with `tokens` in their contexts."""

    kind: str  # "prefill" or "decode"
    tokens: int
    batch: int = 1

    @property
    def name(self) -> str:
        """The case as tables name it."""
        if self.kind == "prefill":
            return f"prefill of {self.tokens}"
        return f"decode, batch {self.batch}, context {self.tokens}"

    def kv_bytes(self, spec: ModelSpec) -> int:
        """Return the bytes of keys and values that it needs at once."""
        grown = self.tokens + (SPARE_TOKENS if self.kind == "decode" else BLOCK_TOKENS)
        return self.batch * grown * spec.kv_token_bytes


class Work(msgspec.Struct, frozen=True):
    """What a token, or a step, must read and compute at least."""

    read_bytes: float
    flops: float


def work_of(case: Case, spec: ModelSpec) -> Work:
    """Return the work of the whole case: a prompt, or one step."""
    config = read_config(spec.path)
    head = config.vocab_tokens * config.hidden_size
    layers = config.layers * _layer_weights(config)
    width = config.layers * config.heads * config.head_dim
    if case.kind == "prefill":
        # Each token looks at those before it and itself; the last one has logits.
        pairs = case.tokens * (case.tokens + 1) / 2
        flops = 2.0 * (case.tokens * layers + head) + 4.0 * width * pairs
        return Work(spec.weight_bytes, flops)
    flops = case.batch * (2.0 * (layers + head) + 4.0 * width * case.tokens)
    return Work(spec.weight_bytes + case.batch * case.tokens * spec.kv_token_bytes, flops)


def _layer_weights(config: ModelConfig) -> int:
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    attention = config.hidden_size * (2 * queries + 2 * keys)
    return attention + 3 * config.hidden_size * config.intermediate_size


def ceiling(case: Case, spec: ModelSpec, limits: Limits) -> float:
    """Return the tokens/s that bandwidth and multiply-adds allow."""
    work = work_of(case, spec)
    made = case.tokens if case.kind == "prefill" else case.batch
    return made / limits.seconds(work.read_bytes, work.flops)


# What is measured, by name: settings of the server. Weights are as in the file unless int8.
BF16_PAIRS = "bf16 x bf16"
KINDS: dict[str, dict[str, Any]] = {
    "bf16": {},
    BF16_PAIRS: {"activation_dtype": "bfloat16"},
    "int8": {"quantize": "int8"},
}


def spec_of(directory: str, kind: str) -> ModelSpec:
    """Return the model as this kind has it."""
    return resolve_all([directory], "", quantize=KINDS[kind].get("quantize", "none"))[0]


def shape_of(spec: ModelSpec) -> KvShape:
    """Return what a token of the model keeps."""
    config = read_config(spec.path)
    elements = 2 * config.layers * config.kv_heads * config.head_dim
    dtype = torch.float32 if spec.kv_token_bytes == 4 * elements else torch.bfloat16
    return KvShape(config.layers, config.kv_heads, config.head_dim, dtype)


class Compute(msgspec.Struct, frozen=True):
    """What computes: a device as the server names it, and threads of the host."""

    threads: int
    device: str = "cpu"

    @property
    def cuda_number(self) -> int | None:
        """The N of cuda:N."""
        return Settings(device=self.device).cuda_number

    def kv_bound_bytes(self) -> int:
        """Return the bytes that keys and values of a case may take, on the host and there."""
        bytes_there = available_bytes()
        if self.cuda_number is not None:
            bytes_there = min(bytes_there, _native.cuda_total_bytes(self.cuda_number))
        return int(KV_SHARE * bytes_there)


def available_bytes() -> int:
    """Return the memory that the system could give."""
    with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123
        lines = dict(line.split(":", 1) for line in file)
    return int(lines["MemAvailable"].split()[0]) * 1024


class OurEngine:
    """A ModelEngine as instances run it, on regions of its own, with one model in memory."""

    def __init__(self, spec: ModelSpec, kind: str, compute: Compute, kv_bytes: int) -> None:
        """Open it and load the model."""
        weights_gb, kv_gb = (spec.weight_bytes + (4 << 20)) / GB, kv_bytes / GB
        self._has_own_memory = Settings(device=compute.device).has_own_memory
        settings = Settings(
            device=compute.device,
            colocated_count=1,
            threads_per_instance=compute.threads,
            max_batch=32,
            model_cache_budget_gb=weights_gb,
            kv_budget_gb=kv_gb,
            device_memory_gb=weights_gb + kv_gb if self._has_own_memory else 0.0,
            **KINDS[kind],
        )
        self._spec = spec
        self._driver = Driver(settings, (spec,))
        self._shape = shape_of(spec)
        total_bytes = choose_budgets(settings, (spec,)).kv_bytes
        self._filler = KvPool(total_bytes, (self._shape,), self._driver.regions.kv, total_bytes)
        self._pages = self._filler.pages(self._shape)
        page = (self._shape.block_pages, *self._pages.shape[1:])
        self._pattern = (torch.rand(page) - 0.5).to(self._shape.dtype)
        self._driver.load(spec.id)
        self._driver.switch(spec.id)
        self._requests: list[str] = []

    def close(self) -> None:
        """Give everything back."""
        self._filler.close()
        self._driver.__exit__()

    def prepare(self, case: Case) -> None:
        """Have the sequences of a decode case in memory, whose contexts hold random KV."""
        for request in self._requests:
            self._driver.release(request)
        self._requests = []
        if case.kind == "decode":
            self._requests = [self._cached(case.tokens) for _ in range(case.batch)]
            # A step goes on without those whose keys and values are still on their way: await them.
            for request in self._requests if self._has_own_memory else ():
                self._driver.decode(self._spec.id, request)

    def seconds(self, case: Case) -> float:
        """Return the seconds of a prompt, or of a step."""
        if case.kind == "decode":
            return self._driver.decode(self._spec.id, *self._requests)
        request = self._driver.submit(self._spec.id, case.tokens, 2)
        took_s = self._driver.prefill(self._spec.id, request)
        self._driver.release(request)
        return took_s

    def _cached(self, tokens: int) -> str:
        """Make a sequence known that lacks nothing but its last token's keys and values, as an
        instance does that another one has prefilled for."""
        blocks = self._filler.allocate(self._shape, blocks_for(tokens))
        for block in blocks:
            self._pages[block : block + self._shape.block_pages] = self._pattern
        offer = self._filler.offer(self._shape, blocks)
        assert offer is not None, "nobody else takes blocks"
        handle = KvHandle(
            owner=offer,
            blocks=tuple(blocks),
            cached_tokens=tokens - 1,
            kv_bytes=len(blocks) * self._shape.block_bytes,
            pool=self._filler.name,
            shape=layout_of(self._shape),
        )
        request = self._driver.adopt(self._spec.id, tokens, SPARE_TOKENS, handle)
        self._filler.free(self._shape, blocks, offer=offer)
        return request


def cases_of(is_quick: bool) -> Iterator[Case]:
    """Yield all cases, those that aims are told for among them."""
    prompts: Sequence[int] = (512, 2048)
    contexts: Sequence[int] = (16, 512, 4096)
    batches: Sequence[int] = (1, 4, 8, 16, 32)
    if is_quick:
        prompts, contexts, batches = (32, 70), (16, 40), (1, 8)
    for tokens in prompts:
        yield Case("prefill", tokens)
    for tokens in contexts:
        for batch in batches:
            yield Case("decode", tokens, batch)
