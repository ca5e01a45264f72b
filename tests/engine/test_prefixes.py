"""What sequences begin with is computed once: found across requests, turns and switches, with the
tokens of a run that finds nothing, and never in anybody's way."""

import itertools
import random

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aegaeon.memory.kv import BLOCK_TOKENS
from aegaeon.types import Decode, Prefill, SamplingParams, Switch
from tests.support.decoder import (
    DEVICES,
    SHAPES,
    VOCAB,
    all_kv_bytes,
    load_tiny,
    make_engine,
    make_request,
)
from tests.support.polling import eventually
from tests.support.runner import Runner

SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, top_k=40, seed=7)
POISON = VOCAB - 1


def words(length, seed):
    return random.Random(f"{length} {seed}").choices(range(POISON), k=length)


SYSTEM = words(70, "system")


@pytest.fixture(scope="module", params=DEVICES)
def device(request):
    return request.param


def run(engine, *requests):
    """Run them one after another; return the tokens of each."""
    runner = Runner(engine)
    for request in requests:
        runner.submit(request)
        runner.finish()
    return runner.tokens


def undisturbed(*requests):
    """The same where nothing is found."""
    return {r.id: run(make_engine(is_sharing=False), r)[r.id] for r in requests}


def counted(engine, model="a"):
    """Have the rows of each forward pass of a model noted."""
    rows = []
    resident = engine._weights.models[model]
    forward = resident.forward
    resident.forward = lambda batch: rows.append(len(batch.token_ids)) or forward(batch)
    return rows


def entries_of(engine):
    return [*engine._kv.prefixes._entries.values()]


def assert_nothing_is_held(engine):
    assert all_kv_bytes(engine) == 0
    indexes = [engine._kv.prefixes, *filter(None, [getattr(engine._kv, "_kept", None)])]
    for index in indexes:
        assert all(entry.uses == 0 for entry in index._entries.values())


def test_the_second_turn_of_a_chat_prefills_only_what_is_new(device):
    engine = make_engine(device=device)
    first = make_request("1", SYSTEM, max_tokens=30)
    answer = run(engine, first)["1"]
    said = words(9, 2)
    second = make_request("2", [*SYSTEM, *answer, *said])
    rows = counted(engine)
    got = run(engine, second)
    assert got == undisturbed(second)
    # The last token of an answer is made, and never run. Where blocks are copied at the border,
    # the turn begins behind it; else with the whole blocks.
    known = len(SYSTEM) + len(answer) - 1
    known = known if device == "cpu" else known // BLOCK_TOKENS * BLOCK_TOKENS
    assert rows[0] == len(second.prompt_token_ids) - known
    assert engine.usage().found_tokens == known
    assert engine.usage().looked_up_tokens == 70 + len(second.prompt_token_ids)
    assert_nothing_is_held(engine)


def test_what_a_prefill_will_find_is_known_before(device):
    engine = make_engine(device=device)
    second = make_request("2", [*SYSTEM, *words(9, 2)])
    assert engine.known_tokens("2") == 0
    engine.submit(second)
    assert engine.known_tokens("2") == 0  # nothing has run yet
    run(engine, make_request("1", SYSTEM))
    assert engine.known_tokens("2") == len(SYSTEM) // BLOCK_TOKENS * BLOCK_TOKENS
    engine.execute(Prefill("a", ("2",)))
    assert engine.known_tokens("2") == len(second.prompt_token_ids)
    engine.submit(make_request("3", SYSTEM[1:]))
    assert engine.known_tokens("3") == 0
    other = make_engine(device=device, is_sharing=False)
    run(other, make_request("1", SYSTEM))
    other.submit(second)
    assert other.known_tokens("2") == 0


def test_what_has_made_room_for_others_is_known_no_more():
    engine = make_engine(kv_bytes=SHAPES["a"].block_bytes * 48)
    run(engine, make_request("1", SYSTEM))
    engine.submit(make_request("2", SYSTEM))
    assert engine.known_tokens("2") == 64
    pool = engine._kv.pool
    held = pool.allocate(SHAPES["a"], pool.free_blocks(SHAPES["a"]))
    assert engine.known_tokens("2") == 0
    pool.free(SHAPES["a"], held)
    engine.execute(Prefill("a", ("2",)))
    assert engine.usage().found_tokens == 0


def test_the_first_token_tells_how_many_were_found(device):
    engine = make_engine(device=device)
    for name, found in (("1", 0), ("2", 64)):
        engine.submit(make_request(name, [*SYSTEM[:64], *words(20, name)]))
        (token,) = engine.execute(Prefill("a", (name,))).tokens
        assert token.cached_tokens == found
        (token,) = engine.execute(Decode("a", (name,))).tokens
        assert token.cached_tokens == 0


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0.0), SAMPLED])
def test_the_same_prompt_again_runs_at_least_its_last_token(device, length, sampling):
    engine = make_engine(device=device)
    first = make_request("1", words(length, 0), sampling=sampling)
    second = msgspec.structs.replace(first, id="2")
    got = run(engine, first)
    rows = counted(engine)
    got |= run(engine, second)
    assert got["1"] == got["2"] == undisturbed(first)["1"]
    assert 1 <= rows[0] <= max(1, length - (length - 1) // BLOCK_TOKENS * BLOCK_TOKENS)


@pytest.mark.parametrize("common", [1, 7, 16, 23, 48, 69])
def test_prompts_part_where_they_differ(device, common):
    engine = make_engine(device=device)
    first = make_request("1", SYSTEM)
    second = make_request("2", [*SYSTEM[:common], 1 + max(SYSTEM[common], 1) % 90, *words(30, 3)])
    got = run(engine, first) | run(engine, second)
    assert got == undisturbed(first, second)
    found = engine.usage().found_tokens
    assert common // BLOCK_TOKENS * BLOCK_TOKENS <= found <= common


def test_blocks_that_are_found_are_to_the_bit_those_that_would_be_made(device):
    """However the prompt was cut that made them."""
    engine, fresh = make_engine(device=device), make_engine(is_sharing=False)
    prompt = [*SYSTEM, *words(50, 4)]
    run(engine, make_request("1", SYSTEM, max_tokens=1))
    run(engine, make_request("2", [*SYSTEM, *words(50, 4)[:20]], max_tokens=1))
    blocks = []
    for one in (engine, fresh):
        one.submit(make_request("3", prompt, max_tokens=2))
        one.execute(Prefill("a", ("3",)))
        sequence, pages = one._sequences.get("3"), one._kv.pool.pages(SHAPES["a"])
        span = SHAPES["a"].block_pages
        blocks.append([pages[b : b + span].clone() for b in sequence.blocks[: 120 // 16]])
    assert engine.usage().found_tokens > 100
    assert all(torch.equal(*pair) for pair in zip(*blocks, strict=True))


def test_those_that_run_together_share_what_they_begin_with(device):
    engine = make_engine(device=device)
    requests = [make_request(str(n), [*SYSTEM[:64], *words(10, n)]) for n in range(5)]
    engine.submit(requests[0])
    engine.execute(Prefill("a", ("0",)))
    alone = engine.usage().kv_bytes
    runner = Runner(engine)
    runner.submit(*requests[1:])
    runner.act(Prefill("a", tuple(str(n) for n in range(1, 5))))
    own_bytes = alone - 4 * SHAPES["a"].block_bytes
    assert engine.usage().kv_bytes == alone + 4 * own_bytes
    engine.release("0")
    assert runner.finish() == undisturbed(*requests[1:])
    assert_nothing_is_held(engine)


def test_those_that_are_prefilled_at_once_each_keep_their_own(device):
    engine = make_engine(device=device)
    requests = [make_request(str(n), SYSTEM) for n in range(3)]
    runner = Runner(engine)
    runner.submit(*requests)
    runner.act(Prefill("a", ("0", "1", "2")))
    assert runner.finish() == undisturbed(*requests)
    assert_nothing_is_held(engine)


def test_what_is_kept_makes_nobody_wait(device):
    """A full pool of what nobody uses: a request that fits alone is served at once."""
    engine = make_engine(device=device, kv_bytes=SHAPES["b"].block_bytes * 26)
    fillers = [make_request(f"f{n}", words(90, n), max_tokens=2) for n in range(12)]
    run(engine, *fillers)
    assert engine.usage().kv_bytes == 0
    room = engine._kv.pool.capacity_blocks(SHAPES["b"])
    large = make_request("l", words(room * BLOCK_TOKENS - 5, 0), model="b", max_tokens=4)
    engine.execute(Switch("b"))
    runner = Runner(engine)
    runner.submit(large)
    outcome = runner.act(Prefill("b", ("l",)))
    assert not outcome.preempted and engine.usage().evicted_blocks > 0
    assert runner.finish() == undisturbed(large)


def test_a_nan_is_never_found(device):
    engine = make_engine(device=device)
    model = engine._weights.models["a"]
    bad, good = [*SYSTEM[:40], POISON, *words(40, 5)], SYSTEM
    run(engine, make_request("1", good))
    model.poison_token = POISON
    runner = Runner(engine)
    runner.submit(make_request("bad", bad))
    runner.act(Prefill("a", ("bad",)))
    assert runner.failures == {"bad": "internal_error"}
    assert not any(POISON in entry.tokens for entry in entries_of(engine))
    model.poison_token = None
    for name, prompt in (("2", bad), ("3", good)):
        request = make_request(name, prompt)
        assert run(engine, request) == undisturbed(request)


def test_what_a_step_that_broke_off_has_left_is_never_found(device, monkeypatch):
    """Keys and values of passes whose logits nobody has seen may be anything."""
    from aegaeon.engine import engine as module  # noqa: PLC0415

    plan = module.plan_passes
    monkeypatch.setattr(module, "plan_passes", lambda those, shares: plan(those, 32, shares))
    engine = make_engine(device=device)
    model = engine._weights.models["a"]
    forward, passes = model.forward, itertools.count()

    def breaks(batch):
        if next(passes):
            raise RuntimeError("the device is gone")
        return forward(batch)

    model.forward = breaks
    engine.submit(make_request("1", SYSTEM))
    with pytest.raises(RuntimeError, match="device is gone"):
        engine.execute(Prefill("a", ("1",)))
    engine.release("1")
    assert entries_of(engine) == []


def test_other_weights_and_other_models_find_nothing(device):
    engine = make_engine(device=device)
    run(engine, make_request("1", SYSTEM), make_request("2", SYSTEM, model="b"))
    found = engine.usage().found_tokens
    assert found == 0
    changed = load_tiny("a", engine._device)
    changed.identity = b"the files were changed"
    engine._weights.models["a"] = changed
    run(engine, make_request("3", SYSTEM))
    assert engine.usage().found_tokens == 0
    run(engine, make_request("4", SYSTEM))
    assert engine.usage().found_tokens > 0


def test_a_sequence_whose_weights_are_replaced_leaves_nothing_to_others(device):
    engine = make_engine(device=device)
    engine.submit(make_request("1", SYSTEM, max_tokens=40))
    engine.execute(Prefill("a", ("1",)))
    known = len(entries_of(engine))
    engine._weights.models["a"].identity = b"the files were changed"
    for _ in range(39):
        engine.execute(Decode("a", ("1",)))
    assert len(entries_of(engine)) == known
    assert_nothing_is_held(engine)


def test_without_sharing_nothing_is_found_or_kept(device):
    engine = make_engine(device=device, is_sharing=False)
    run(engine, make_request("1", SYSTEM), make_request("2", SYSTEM))
    usage = engine.usage()
    assert (usage.found_tokens, usage.looked_up_tokens, usage.evicted_blocks) == (0, 0, 0)
    assert entries_of(engine) == []


def test_what_a_switch_drives_off_the_device_is_found_on_the_host():
    engine = make_engine(device="staged", kv_bytes=SHAPES["b"].block_bytes * 26, host_bytes=8 << 20)
    engine._costs.is_worth_copying = lambda *_: True  # on a busy machine it may seem not to be
    run(engine, make_request("1", SYSTEM))
    engine.execute(Switch("b"))
    spill = engine._kv._spill
    eventually(lambda: spill._ticket is None or spill._ticket.is_done)
    room = engine._kv.pool.capacity_blocks(SHAPES["b"])
    run(engine, make_request("2", words(room * BLOCK_TOKENS - 5, 0), model="b", max_tokens=4))
    assert engine.usage().evicted_blocks > 0
    engine.execute(Switch("a"))
    third = make_request("3", [*SYSTEM, *words(20, 3)])
    before = engine.usage().moved["kv_in"].count
    assert run(engine, third) == undisturbed(third)
    assert engine.usage().found_tokens == 64
    assert engine.usage().moved["kv_in"].count == before + 1
    assert_nothing_is_held(engine)


def test_what_goes_to_the_host_is_in_nobodys_way():
    """On a link that stands still: the next model takes the device's room, and the host's."""
    blocks = SHAPES["b"].block_bytes * 26
    engine = make_engine(device="staged", kv_bytes=blocks, host_bytes=blocks, link_bytes_per_s=1)
    run(engine, make_request("1", SYSTEM))
    engine.execute(Switch("b"))
    assert engine._kv._spill._leaving
    room = engine._kv.pool.capacity_blocks(SHAPES["b"])
    large = make_request("2", words(room * BLOCK_TOKENS - 5, 0), model="b", max_tokens=4)
    assert run(engine, large) == undisturbed(large)
    again = make_request("3", SYSTEM)
    assert run(engine, again) == undisturbed(again)
    assert engine.usage().found_tokens == 0
    assert_nothing_is_held(engine)
    engine.close()


def tree(choose, count):
    """Prompts of which many begin as others do, and go on elsewhere."""
    prompts = [words(choose.randint(1, 60), choose.random())]
    while len(prompts) < count:
        begun = choose.choice(prompts)
        kept = begun[: choose.randint(0, len(begun))]
        prompts.append([*kept, *words(choose.randint(1, 50), choose.random())][:300])
    return prompts


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 1 << 32), st.booleans())
def test_tokens_of_random_trees_of_prompts_are_those_of_runs_alone(device, seed, is_scarce):
    choose = random.Random(seed)
    requests = [
        make_request(
            str(n),
            prompt,
            model=choose.choice("ab"),
            sampling=SAMPLED if n % 2 else SamplingParams(temperature=0.0),
            max_tokens=choose.randint(1, 20),
        )
        for n, prompt in enumerate(tree(choose, 14))
    ]
    kv_bytes = SHAPES["b"].block_bytes * 26 if is_scarce else 8 << 20
    engine = make_engine(device=device, kv_bytes=kv_bytes)
    runner = Runner(engine)
    at = 0
    while at < len(requests):
        group = requests[at : at + choose.randint(1, 5)]
        at += len(group)
        runner.submit(*group)
        runner.finish(choose)
    assert runner.tokens == undisturbed(*requests)
    assert_nothing_is_held(engine)
    engine.close()
