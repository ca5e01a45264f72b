"""Prompts prefilled in pieces: what they make is what they make whole, whatever comes between."""

import math
import random
from contextlib import ExitStack

import pytest
import torch

from aegaeon.config import Settings
from aegaeon.engine.open import open_engine
from aegaeon.models.references import resolve
from aegaeon.types import Begun, Decode, Prefill, SamplingParams, Stepped, Switch
from tests.support.checkpoints import make_checkpoint
from tests.support.decoder import all_kv_bytes, load_in_thread, make_request
from tests.support.regions import own_regions
from tests.support.runner import Runner

FAMILIES = ("llama", "qwen2", "qwen3")
GREEDY = SamplingParams(temperature=0.0)
SCORED = SamplingParams(temperature=0.0, logprobs=2, prompt_logprobs=3)
SEEDED = SamplingParams(temperature=0.8, seed=5, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    paths = [make_checkpoint(root / f, f, seed=n) for n, f in enumerate(FAMILIES)]
    return tuple(resolve(str(path), root) for path in paths)


@pytest.fixture
def opened(specs):
    """Opens an engine with the models loaded, on a node of its own; all are closed in the end."""
    with ExitStack() as stack:

        def open_one(device="cpu", kv_gb=0.01):
            settings = Settings(
                device=device,
                model_cache_budget_gb=0.05,
                kv_budget_gb=kv_gb,
                device_memory_gb=0 if device == "cpu" else kv_gb + 0.05,
                link_gb_per_s=1.0,
                threads_per_instance=1,
            )
            engine = open_engine(settings, specs, stack.enter_context(own_regions()))
            stack.callback(engine.close)
            for spec in specs:
                load_in_thread(engine, spec.id)
            return engine

        yield open_one


def requests_of(spec, lengths=(3, 50, 130)):
    samplings = (GREEDY, SCORED, SEEDED)
    return [
        make_request(
            f"{spec.id} {i}",
            [(11 * k + 5 * i) % 300 + 3 for k in range(length)],
            model=spec.id,
            sampling=samplings[i % 3],
            max_tokens=6,
        )
        for i, length in enumerate(lengths)
    ]


def whole(engine, request):
    runner = Runner(engine)
    runner.submit(request)
    runner.finish()
    return runner.tokens[request.id], runner.log_probs[request.id], runner.scores[request.id]


@pytest.mark.parametrize("device", ["cpu", "staged"])
@pytest.mark.parametrize("seed", range(3))
def test_random_pieces_make_the_tokens_and_scores_of_whole_prompts(opened, specs, device, seed):
    """With switches, and steps of others, between them; prompts are pre-empted on the way."""
    choose = random.Random(seed)
    plain = opened("cpu")
    expected = {r.id: whole(plain, r) for spec in specs for r in requests_of(spec)}
    engine = opened(device, kv_gb=0.00016)
    runner = Runner(engine)
    runner.pieces = lambda: choose.choice([None, 1, 7, 16, 33, 64])
    for spec in specs:
        runner.submit(*requests_of(spec))
    runner.finish(choose)
    for name, told in expected.items():
        assert (runner.tokens[name], runner.log_probs[name], runner.scores[name]) == told
    assert runner.begun >= 5
    # Where keys and values leave by copies, room may have come before anybody needs it.
    assert runner.preempted or device == "staged"
    assert all_kv_bytes(engine) == 0


def test_a_piece_goes_to_the_first_and_says_how_far_each_is(opened, specs):
    engine, model = opened(), specs[0].id
    first, second, third = requests_of(specs[0], (3, 50, 60))
    for request in (first, second, third):
        engine.submit(request)
    engine.execute(Switch(model))
    names = (first.id, second.id, third.id)
    outcome = engine.execute(Prefill(model, names, 40))
    assert isinstance(outcome, Stepped)
    assert [token.request_id for token in outcome.tokens] == [first.id]
    assert outcome.begun == (Begun(second.id, 37, 0), Begun(third.id, 0, 0))
    again = engine.execute(Prefill(model, names[1:], 40))
    assert [token.request_id for token in again.tokens] == [second.id]
    assert again.begun == (Begun(third.id, 27, 0),)
    rest = engine.execute(Prefill(model, names[2:]))
    assert [token.request_id for token in rest.tokens] == [third.id] and not rest.begun


def test_what_is_half_prefilled_is_cancelled_like_any_other(opened, specs):
    engine, model = opened(), specs[1].id
    request, other = requests_of(specs[1], (130, 40))
    expected = whole(opened(), other)
    engine.submit(request)
    engine.execute(Switch(model))
    engine.execute(Prefill(model, (request.id,), 50))
    assert all_kv_bytes(engine) > 0
    engine.release(request.id)
    assert all_kv_bytes(engine) == 0
    assert whole(engine, other) == expected


@pytest.mark.parametrize("device", ["cpu", "staged"])
def test_a_prompt_that_ends_between_pieces_leaves_them_to_others(opened, specs, device):
    engine, model = opened(device), specs[0].id
    ids = [(7 * k) % 300 + 3 for k in range(100)]
    first, second = (
        make_request(name, ids, model=model, sampling=GREEDY, max_tokens=6) for name in "ab"
    )
    expected = whole(opened(), first)
    engine.submit(first)
    engine.execute(Switch(model))
    engine.execute(Prefill(model, ("a",), 64))
    assert engine.known_tokens("a") == 64
    engine.release("a")
    runner = Runner(engine)
    runner.submit(second)
    assert engine.known_tokens("b") == 64
    outcome = runner.act(Prefill(model, ("b",), 64))
    assert outcome.tokens[0].cached_tokens == 64
    runner.finish()
    assert (runner.tokens["b"], runner.log_probs["b"], runner.scores["b"]) == expected


def test_nobody_begins_with_a_piece_that_is_not_finite(opened, specs):
    engine, model = opened(), specs[0].id
    ids = [(7 * k) % 300 + 3 for k in range(100)]
    first, second = (make_request(name, ids, model=model, sampling=GREEDY) for name in "ab")
    expected = whole(opened(), first)
    runner = Runner(engine)
    runner.submit(first, second)
    engine.execute(Switch(model))
    engine.execute(Prefill(model, ("a",), 20))
    sequence = engine._sequences.get("a")
    block, count = sequence.blocks[1], sequence.shape.block_pages
    with torch.inference_mode():
        engine._kv.pool.pages(sequence.shape)[block : block + count] = math.nan
    (begun,) = engine.execute(Prefill(model, ("a",), 44)).begun
    assert begun == Begun("a", 64, 20)
    assert engine.known_tokens("b") == 16  # of the first piece
    assert runner.act(Prefill(model, ("a",))).failed
    assert engine.known_tokens("b") == 16
    runner.act(Prefill(model, ("b",)))
    runner.finish()
    assert runner.tokens["b"] == expected[0]


def test_pieces_of_a_prompt_that_begins_as_another_count_as_found_once(opened, specs):
    engine, model = opened(), specs[2].id
    ids = [(7 * k) % 300 + 3 for k in range(64)]
    longer = make_request("b", [*ids, *range(5, 105)], model=model, max_tokens=2, sampling=GREEDY)
    whole(engine, make_request("a", ids, model=model, sampling=GREEDY, max_tokens=2))
    before = engine.usage()
    engine.submit(longer)
    engine.execute(Switch(model))
    for _ in range(20):
        outcome = engine.execute(Prefill(model, ("b",), 16))
        if outcome.tokens:
            break
    after = engine.usage()
    assert after.looked_up_tokens - before.looked_up_tokens == 164
    found = after.found_tokens - before.found_tokens
    assert found >= 48 and outcome.tokens[0].cached_tokens == found
    engine.execute(Decode(model, ("b",)))
