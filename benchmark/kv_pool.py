#!/usr/bin/env python3
"""The KV pool: what a block costs to allocate, and what six shapes leave unused of the arena."""

import argparse
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

# Started by its path, Python looks beside this file and not in the root of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aegaeon import _native
from aegaeon.errors import OutOfBlocks
from aegaeon.memory.kv import KvPool, KvShape, blocks_for
from benchmark.report_rows import Aim, Row, measured, progress, publish

MODELS = {
    "Qwen3-0.6B": KvShape(28, 8, 128),
    "Qwen3-1.7B": KvShape(28, 8, 128),
    "Qwen3-4B": KvShape(36, 8, 128),
    "Llama-3.2-1B": KvShape(16, 8, 64),
    "SmolLM2-135M": KvShape(30, 3, 64),
    "Qwen2.5-0.5B": KvShape(24, 2, 64),
}
SHAPES = tuple(MODELS.values())
POOL_BYTES = 4 << 30
SLABS, BLOCK = (14_680_064, 64), (737_280, 4096, 1)  # SmolLM2's blocks
HELD = 700  # of 1216, while others come and go
BATCH = 64
LONGEST_TOKENS = 2048
GROWTH = 0.55  # of the steps start a sequence or lengthen one; the others end one


def free_list_ns(rounds: int) -> float:
    """Return nanoseconds to take a block from the peer, a Python list, one by one."""
    free = list(range(SLABS[0] // BLOCK[0] * SLABS[1]))
    taken_ns = 0
    for _ in range(rounds):
        start = time.perf_counter_ns()
        taken = [free.pop() for _ in range(BATCH)]
        taken_ns += time.perf_counter_ns() - start
        free.extend(taken)
    return taken_ns / rounds / BATCH


def batches_ns(pool: _native.KvPool, rounds: int) -> float:
    """Return nanoseconds a block to allocate BATCH at once from Python."""
    taken_ns = 0
    for _ in range(rounds):
        start = time.perf_counter_ns()
        blocks = pool.allocate(0, BATCH)
        taken_ns += time.perf_counter_ns() - start
        pool.free(0, blocks)
    return taken_ns / rounds / BATCH


def measure_speed(repeats: int, rounds: int) -> list[Row]:
    """Nanoseconds to allocate a block, runs of all alternating."""
    progress("allocation")
    pool = _native.KvPool.open_private(SLABS, (BLOCK,), SLABS[0] * SLABS[1])
    singles: list[tuple[float, float]] = []
    batches: list[tuple[float, float]] = []
    for _ in range(repeats):
        peer = free_list_ns(rounds)
        singles.append((pool.time_allocations(0, HELD, rounds), peer))
        batches.append((batches_ns(pool, rounds), peer))
    cases = {"a block, one by one": singles, f"a block, {BATCH} at once from Python": batches}
    rows = []
    for case, runs in cases.items():
        row = Row(
            case=case,
            unit="ns",
            ours=median(ours for ours, _ in runs),
            peer="a Python free list",
            peer_value=median(theirs for _, theirs in runs),
        )
        rows.append(measured(row, Aim("ours", 200, "< 200 ns", False), less_is_better=True))
    return rows


def sequence_tokens(rng: random.Random) -> int:
    """Return a length of prompt and answer: many short ones, few long ones."""
    return min(LONGEST_TOKENS, 16 + int(rng.expovariate(1 / 400)))


def fragmentation(seed: int, pool_bytes: int) -> float:
    """Return the share of the pool that is bound and not held when an allocation first fails.

    Sequences of random models come with a prompt, grow block by block and end in random order, a
    little fewer than come.
    """
    rng = random.Random(seed)
    pool = KvPool(pool_bytes, SHAPES)
    living: list[tuple[KvShape, list[int]]] = []
    try:
        while True:
            if not living or rng.random() < GROWTH:
                is_new = not living or rng.random() < 0.3
                shape, blocks = (rng.choice(SHAPES), []) if is_new else rng.choice(living)
                count = blocks_for(sequence_tokens(rng)) if is_new else 1
                blocks += pool.allocate(shape, count)
                if is_new:
                    living.append((shape, blocks))
            elif rng.random() < 0.3:
                place = rng.randrange(len(living))
                living[place], living[-1] = living[-1], living[place]
                pool.free(*living.pop())
    except OutOfBlocks:
        bound = len(set(slabs_of(pool, living)))
        return (bound * pool.slab_bytes - pool.used_bytes) / (pool.slab_count * pool.slab_bytes)


def slabs_of(pool: KvPool, living: Sequence[tuple[KvShape, list[int]]]) -> Iterator[int]:
    """Yield the slab of each block."""
    for shape, blocks in living:
        for block in blocks:
            yield block * shape.page_bytes // pool.slab_bytes


def measure_fragmentation(seeds: int) -> list[Row]:
    """Median and worst of random workloads."""
    progress(f"fragmentation, {seeds} workloads")
    shares = [100 * fragmentation(seed, POOL_BYTES) for seed in range(seeds)]
    aim = Aim("ours", 20, "< 20 %", is_least=False)
    found = {"median": median(shares), f"worst of {seeds}": max(shares)}
    return [
        measured(Row(case=f"unused in slabs of six models, {name}", unit="%", ours=share), aim)
        for name, share in found.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--quick", action="store_true", help="a look that it works, a second")
    parser.add_argument("--repeats", type=int, default=9, help="alternating runs of each")
    parser.add_argument("--seeds", type=int, default=100, help="random workloads")
    options = parser.parse_args(arguments)
    repeats, rounds, seeds = options.repeats, 3_000, options.seeds
    if options.quick:
        repeats, rounds, seeds = 1, 200, 2
    rows = measure_speed(repeats, rounds) + measure_fragmentation(seeds)
    publish("KV pool", rows, options.json)


if __name__ == "__main__":
    main()
