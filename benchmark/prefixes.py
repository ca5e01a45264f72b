#!/usr/bin/env python3
"""The prefix cache: the second turn of a chat with it and without, at one instance and, with
--model, at servers of two, one of which prefills and decodes apart, and what looking costs."""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

# Started by its path, Python looks beside this file and not in the root of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aegaeon.config import Settings
from aegaeon.memory.budget import GB
from aegaeon.memory.kv import BLOCK_TOKENS, KvPool, KvShape, blocks_for
from aegaeon.memory.prefixes import Chain, Held, Prefixes
from aegaeon.models.references import resolve
from aegaeon.types import ModelSpec
from benchmark.prefix_instances import Turns, measure_instances, token_ids
from benchmark.random_model import SMALL, write_model
from benchmark.report_rows import Aim, Row, measured, progress, publish
from benchmark.serving import ServerError
from benchmark.switch_engine import Driver

KV_GB = 0.5
# Of a block as small as there are: what is measured is the index, not memory.
TINY = KvShape(1, 1, 16)
IDENTITY = b"a model"


def first_token_s(driver: Driver, model: str, prompt: Sequence[int], answer: int = 1) -> float:
    """Return the seconds of a prompt's prefill; the answer is of so many tokens."""
    request = driver.submit_ids(model, prompt, answer)
    took_s = driver.prefill(model, request)
    for _ in range(answer - 1):
        driver.decode(model, request)
    driver.release(request)
    return took_s


def measure_turns(spec: ModelSpec, turns: Turns, repeats: int) -> list[Row]:
    """Milliseconds to the first token of a second turn; the peer runs a prompt of its length that
    nobody has sent before. Both in turn, in one engine."""
    progress(f"{spec.id}: turns of {turns.prompt} and {turns.second} tokens")
    settings = Settings(
        device="cpu",
        colocated_count=1,
        model_cache_budget_gb=(spec.weight_bytes + (4 << 20)) / GB,
        kv_budget_gb=KV_GB,
    )
    found: list[float] = []
    whole: list[float] = []
    with Driver(settings, (spec,), prefix_cache=True) as driver:
        driver.load(spec.id)
        driver.switch(spec.id)
        first_token_s(driver, spec.id, token_ids(turns.second, "warm"))
        for at in range(repeats):
            prompt = token_ids(turns.prompt, f"chat {at}")
            first_token_s(driver, spec.id, prompt, turns.answer)
            # An answer of other tokens than it gave: only the first prompt is found for certain.
            second = [*prompt, *token_ids(turns.answer + turns.more, f"more {at}")]
            before = driver.engine.usage().found_tokens
            found.append(first_token_s(driver, spec.id, second))
            if driver.engine.usage().found_tokens - before < turns.prompt // BLOCK_TOKENS:
                raise SystemExit("the second turn did not find the first one")
            whole.append(first_token_s(driver, spec.id, token_ids(turns.second, f"other {at}")))
    row = Row(
        case=f"{spec.id}: first token of a second turn, {turns.second} tokens after {turns.prompt}",
        unit="ms",
        ours=1e3 * median(found),
        peer="all of it prefilled",
        peer_value=1e3 * median(whole),
    )
    least = turns.second / (turns.second - turns.prompt) / 2
    aim = Aim("ratio_to_peer", least, f">= {least:.1f} x")
    return [measured(row, aim, less_is_better=True)]


def look(prefixes: Prefixes, ids: Sequence[int]) -> Iterator[tuple[str, float]]:
    """Yield what is done with a prompt, which nobody has sent before and somebody then again, and
    the seconds of each."""
    count = len(ids) // BLOCK_TOKENS
    first, second = (Chain(IDENTITY, lambda start, stop: ids[start:stop]) for _ in range(2))
    start = time.perf_counter()
    assert not prefixes.find(TINY, first, count).blocks
    yield "looked up, not found", time.perf_counter() - start
    held = Held(prefixes.pool.allocate(TINY, count))
    start = time.perf_counter()
    prefixes.publish(TINY, first, held, count)
    yield "kept", time.perf_counter() - start
    start = time.perf_counter()
    prefixes.free(TINY, first, held)
    yield "let go", time.perf_counter() - start
    start = time.perf_counter()
    again = prefixes.find(TINY, second, count)
    yield "found", time.perf_counter() - start
    assert len(again.blocks) == count
    prefixes.free(TINY, second, again)


def measure_looks(tokens: int, repeats: int) -> list[Row]:
    """Milliseconds of all that a prompt of `tokens` costs in the index, found or not."""
    progress(f"the index, {tokens} tokens")
    count = blocks_for(tokens)
    pool = KvPool(4 * count * TINY.block_bytes, (TINY,))
    prefixes = Prefixes(pool)
    taken: dict[str, list[float]] = {}
    for at in range(repeats):
        ids = token_ids(tokens, f"prompt {at}")
        for case, took_s in look(prefixes, ids):
            taken.setdefault(case, []).append(1e3 * took_s)
    aim = Aim("ours", 20, "< 20 ms", is_least=False)
    return [
        measured(Row(case=f"{tokens} tokens {case}", unit="ms", ours=median(times)), aim)
        for case, times in taken.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--quick", action="store_true", help="a look that it works, seconds")
    parser.add_argument("--model", help="a checkpoint's directory (default: a small random one)")
    parser.add_argument("--repeats", type=int, default=7, help="chats of each kind")
    options = parser.parse_args(arguments)
    repeats = 2 if options.quick else options.repeats
    with tempfile.TemporaryDirectory(prefix="aegaeon-prefixes-") as directory:
        made = Path(directory)
        reference = options.model or f"small={write_model(made / 'small', SMALL).parent}"
        spec = resolve(reference, made, "float32", "none")
        turns = Turns(480, 40, 24)
        rows = measure_turns(spec, turns, repeats)
        if options.model:  # the small one has no tokenizer, which a server needs
            try:
                rows += measure_instances(spec.path, spec.id, turns, repeats)
            except ServerError as error:
                raise SystemExit(str(error)) from None
    rows += measure_looks(2048 if options.quick else 32_768, repeats)
    publish("Prefix cache", rows, options.json)


if __name__ == "__main__":
    main()
