"""Sampling, log-probabilities and the thread pool, measured by benchmark/kernels.py."""

from collections.abc import Iterator

import torch
from torch import Tensor

from aegaeon import _native
from benchmark.kernel_cases import Case, Scale

POOL_ROUNDS = 100
SAMPLED_ROWS = (1, 32)
BEST = 20
# (temperature, top_k, top_p) by name; and how steep the logits are: a model's, and nearly flat.
WAYS = {
    "greedy": (0.0, 0, 1.0),
    "temperature 1": (1.0, 0, 1.0),
    "top-k 40": (1.0, 40, 1.0),
    "top-p 0.9": (1.0, 0, 0.9),
}
STEEPNESS = {"": 2.5, ", flat logits": 1.0}


def sampling_cases(pool: _native.ThreadPool, scale: Scale) -> Iterator[Case]:
    """Yield each way to draw a token, in microseconds a row."""
    for rows in SAMPLED_ROWS:
        for told, steepness in STEEPNESS.items():
            logits = torch.randn(rows, scale.sizes.vocab) * steepness
            for name in WAYS:
                if not told or name == "top-p 0.9":
                    yield _sampling_case(pool, logits, name, told)
    yield _log_probability_case(pool, torch.randn(SAMPLED_ROWS[-1], scale.sizes.vocab))


def _sampling_case(pool: _native.ThreadPool, logits: Tensor, name: str, told: str) -> Case:
    temperature, top_k, top_p = WAYS[name]
    rows, vocab = logits.shape
    positions = iter(range(1 << 62))

    def ours() -> None:
        at = next(positions)
        draws = [(temperature, top_k, top_p, 0.0, row, at) for row in range(rows)]
        _native.sample(pool, logits.data_ptr(), (rows, vocab), draws)

    return Case(
        name=f"sample {vocab}, {name}{told}, {rows} row{'s' * (rows != 1)}",
        read_bytes=4.0 * logits.numel(),
        flops=0.0,
        ours=ours,
        torchs=lambda: _torchs(logits, temperature, top_k, top_p),
        items=rows,
    )


def _torchs(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Draw as servers on torch do."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, ids = logits.sort(descending=True)
        weights = ordered.softmax(-1)
        dropped = weights.cumsum(-1) - weights > top_p
        logits = torch.full_like(logits, -torch.inf).scatter(
            -1, ids, ordered.masked_fill(dropped, -torch.inf)
        )
    return logits.softmax(-1).multinomial(1)


def _log_probability_case(pool: _native.ThreadPool, logits: Tensor) -> Case:
    rows, vocab = logits.shape
    chosen = list(range(rows))
    return Case(
        name=f"log-probabilities {vocab}, {BEST} best, {rows} rows",
        read_bytes=4.0 * logits.numel(),
        flops=0.0,
        ours=lambda: _native.log_probabilities(
            pool, logits.data_ptr(), (rows, vocab), chosen, BEST
        ),
        torchs=lambda: logits.log_softmax(-1).topk(BEST),
        items=rows,
    )


def pool_cases(pool: _native.ThreadPool, _: Scale) -> Iterator[Case]:
    """Yield what a fork and join of the pool costs."""
    yield Case(
        name=f"fork and join, {pool.threads} threads",
        read_bytes=0.0,
        flops=0.0,
        ours=lambda: _native.fork_join(pool, POOL_ROUNDS),
        torchs=None,
        items=POOL_ROUNDS,
    )
