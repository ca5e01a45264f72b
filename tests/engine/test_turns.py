"""Turns of a chat that several engines of one pool prefill and decode: what one left the others
find, with the tokens of a run that finds nothing."""

import itertools
import random

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aegaeon.errors import KvGone, OutOfBlocks
from aegaeon.memory.kv import BLOCK_TOKENS
from aegaeon.memory.prefixes import LEAST_BORDER_TOKENS
from aegaeon.types import Decode, Prefill, SamplingParams, Switch
from tests.engine.test_prefixes import (
    SAMPLED,
    SYSTEM,
    assert_nothing_is_held,
    counted,
    entries_of,
    run,
    tree,
    undisturbed,
    words,
)
from tests.support.decoder import DEVICES, SHAPES, make_engine, make_request
from tests.support.polling import eventually
from tests.support.regions import own_regions
from tests.support.runner import Runner


@pytest.fixture
def path():
    with own_regions() as regions:
        yield regions.kv


@pytest.fixture(params=list(itertools.product(DEVICES, DEVICES)), ids=" and ".join)
def engines(request, path):
    """One that prefills and one that decodes."""
    made = [make_engine(kv_path=path, kv_bytes=1 << 20, device=device) for device in request.param]
    for engine in made:
        engine._costs.is_worth_copying = lambda *_: True
    yield made
    for engine in made:
        engine.close()


def is_staged(engine):
    return hasattr(engine._kv, "_spill")


def rest_at(engine):
    """What an engine knows that rests."""
    prefixes = engine._kv.prefixes
    return [entry for entry in entries_of(engine) if not entry.uses and prefixes.is_here(entry)]


def until_returned(engine):
    """What was brought out of a device may be found."""
    if is_staged(engine):
        spill = engine._kv._spill
        eventually(lambda: spill.ticket is None and not spill._device.ended)


def prefilled(engine, request):
    """Prefill there; return the request with its first token."""
    engine.submit(request)
    (token,) = engine.execute(Prefill(request.model, (request.id,))).tokens
    return msgspec.structs.replace(request, generated_token_ids=(token.token_id,))


def adopted(first, second, told):
    second.adopt(told, first.hand_over(told.id))
    first.release(told.id)


def turn(first, second, request):
    """Prefill at one, decode at the other; return the answer."""
    told = prefilled(first, request)
    adopted(first, second, told)
    runner = Runner(second)
    runner.go_on(request.id, request.model, list(told.generated_token_ids))
    answer = runner.finish()[request.id]
    until_returned(second)
    return answer


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0.0), SAMPLED])
def test_the_next_turn_prefills_only_what_is_new_though_another_made_the_answer(engines, sampling):
    first, second = engines
    prompt, before = SYSTEM, []
    for number in range(4):
        request = make_request(f"{number}", prompt, sampling=sampling, max_tokens=30)
        rows = counted(first)
        answer = turn(first, second, request)
        assert answer == undisturbed(request)[request.id]
        known = len(prompt)
        if number:
            known = len(before) - 1
            # Where blocks are copied at the border, a turn begins there; else with whole blocks.
            border = known % BLOCK_TOKENS
            if is_staged(first) or is_staged(second) or border < LEAST_BORDER_TOKENS:
                known -= border
            assert rows == [len(prompt) - known]
        before = [*prompt, *answer]
        prompt = [*before, *words(9, number)]
    assert sum(counted(second)) == 0
    for engine in engines:
        assert_nothing_is_held(engine)


def test_the_first_token_tells_how_much_was_found(engines):
    first, second = engines
    answer = turn(first, second, make_request("1", SYSTEM, max_tokens=30))
    again = make_request("2", [*SYSTEM, *answer, *words(9, 2)])
    first.submit(again)
    known = (len(SYSTEM) + len(answer) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    assert first.known_tokens("2") == known
    (token,) = first.execute(Prefill("a", ("2",))).tokens
    assert known <= token.cached_tokens < known + BLOCK_TOKENS


def test_without_the_cache_the_tokens_are_the_same(path):
    first, second = (make_engine(kv_path=path, kv_bytes=1 << 20, is_sharing=False) for _ in "12")
    request = make_request("1", SYSTEM, max_tokens=30)
    answer = turn(first, second, request)
    again = make_request("2", [*SYSTEM, *answer, *words(9, 2)])
    rows = counted(first)
    assert turn(first, second, again) == undisturbed(again)["2"]
    assert rows == [len(again.prompt_token_ids)]
    for engine in (first, second):
        assert_nothing_is_held(engine)
        engine.close()


def test_a_turn_is_found_by_a_third_that_has_never_seen_the_chat(engines, path):
    first, second = engines
    answer = turn(first, second, make_request("1", SYSTEM, max_tokens=30))
    third = make_engine(kv_path=path, kv_bytes=1 << 20)
    again = make_request("2", [*SYSTEM, *answer, *words(9, 2)])
    assert run(third, again) == undisturbed(again)
    assert third.usage().found_tokens >= (len(SYSTEM) + 29) // BLOCK_TOKENS * BLOCK_TOKENS
    third.close()


def test_one_copy_of_a_turn_rests(path):
    """The prompt's, which were copied to be handed over, take no room twice."""
    first, second = (make_engine(kv_path=path, kv_bytes=1 << 20) for _ in range(2))
    answer = turn(first, second, make_request("1", SYSTEM, max_tokens=30))
    turn(first, second, make_request("2", [*SYSTEM, *answer, *words(9, 2)]))
    resting = [(e.key, e.block) for e in (*rest_at(first), *rest_at(second))]
    assert len({key for key, _ in resting}) == len(set(resting))
    for engine in (first, second):
        assert_nothing_is_held(engine)
        engine.close()


@pytest.mark.parametrize("which", ["prefilled", "decoded"])
def test_what_a_closed_engine_left_is_run_again(engines, path, which):
    first, second = engines
    answer = turn(first, second, make_request("1", SYSTEM, max_tokens=30))
    again = make_request("2", [*SYSTEM, *answer, *words(9, 2)])
    (first if which == "prefilled" else second).close()
    heir = make_engine(kv_path=path, kv_bytes=1 << 20)
    left = heir if which == "prefilled" else first
    assert turn(left, second if which == "prefilled" else heir, again) == undisturbed(again)["2"]
    for engine in {left, heir}:
        assert_nothing_is_held(engine)
    heir.close()


def test_what_other_weights_made_is_not_found(path):
    first, second = (make_engine(kv_path=path, kv_bytes=1 << 20) for _ in range(2))
    second._weights.models["a"].identity = b"the files were changed"
    answer = turn(first, second, make_request("1", SYSTEM, max_tokens=30))
    again = make_request("2", [*SYSTEM, *answer, *words(9, 2)])
    rows = counted(first)
    assert run(first, again) == undisturbed(again)
    whole = len(SYSTEM) // BLOCK_TOKENS * BLOCK_TOKENS
    assert rows[0] == len(again.prompt_token_ids) - whole
    for engine in (first, second):
        assert_nothing_is_held(engine)
        engine.close()


def test_a_cancelled_answer_is_found_as_far_as_it_went(engines):
    first, second = engines
    request = make_request("1", SYSTEM, max_tokens=200)
    told = prefilled(first, request)
    adopted(first, second, told)
    runner = Runner(second)
    runner.go_on("1", "a", made := list(told.generated_token_ids))
    for _ in range(40):
        runner.act(Decode("a", ("1",)))
    second.release("1")
    until_returned(second)
    again = make_request("2", [*SYSTEM, *made, *words(9, 2)])
    assert turn(first, second, again) == undisturbed(again)["2"]
    assert first.usage().found_tokens >= (len(SYSTEM) + 40) // BLOCK_TOKENS * BLOCK_TOKENS
    for engine in engines:
        assert_nothing_is_held(engine)


def go_on_elsewhere(first, second, told):
    """Hand over, or prefill again where that cannot be, as instances do."""
    kv = first.hand_over(told.id)
    try:
        second.adopt(told, kv)
    except (KvGone, OutOfBlocks):
        second.submit(told)
    first.release(told.id)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 1 << 32), st.booleans())
def test_chats_of_many_between_three_engines_have_the_tokens_of_runs_alone(seed, is_scarce):
    """Whoever prefills and decodes, runs out of room, is asked no more, or goes away."""
    choose = random.Random(seed)
    kv_bytes = SHAPES["b"].block_bytes * 26 if is_scarce else 1 << 20
    with own_regions() as regions:
        engines = [
            make_engine(kv_path=regions.kv, kv_bytes=kv_bytes, device=choose.choice(DEVICES))
            for _ in range(3)
        ]
        chats = [[*prompt] for prompt in tree(choose, 5)]
        for number in range(18):
            at, chat = choose.randrange(3), choose.choice(chats)
            request = make_request(
                str(number),
                chat[-400:],
                model=choose.choice("aab"),
                sampling=SAMPLED if number % 2 else SamplingParams(temperature=0.0),
                max_tokens=choose.randint(2, 40),
            )
            first, second = engines[at], engines[(at + choose.randint(1, 2)) % 3]
            first.execute(Switch(request.model))
            told = prefilled(first, request)
            if choose.random() < 0.1:
                first.release(request.id)
                continue
            go_on_elsewhere(first, second, told)
            runner = Runner(second)
            runner.go_on(request.id, request.model, list(told.generated_token_ids))
            answer = runner.finish()[request.id]
            assert answer == undisturbed(request)[request.id]
            chat += [*answer, *words(choose.randint(1, 20), number)]
            if choose.random() < 0.1:
                engines[at].close()
                engines[at] = make_engine(kv_path=regions.kv, kv_bytes=kv_bytes)
        for engine in engines:
            assert_nothing_is_held(engine)
            engine.close()
