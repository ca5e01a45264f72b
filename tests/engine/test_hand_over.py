"""KV that is prefilled in one engine and decoded in another: the same tokens, no bytes moved."""

import itertools

import msgspec
import pytest

from aegaeon.engine.kv_swap import SwappedKv
from aegaeon.errors import ContextLengthExceeded, KvGone, KvUnreachable, OutOfBlocks
from aegaeon.types import Decode, DeviceKv, Prefill, SamplingParams, Switch
from tests.support.decoder import DEVICES, all_kv_bytes, make_engine, make_request
from tests.support.runner import Runner

SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, seed=7)
PROMPT = list(range(40))


@pytest.fixture(params=list(itertools.product(DEVICES, DEVICES)), ids=" to ".join)
def engines(request, tmp_path):
    """Two engines over one pool, the sender's device first."""
    path = str(tmp_path / "pool")
    made = [make_engine(kv_path=path, kv_bytes=1 << 20, device=device) for device in request.param]
    yield made
    for engine in made:
        engine.close()


def prefilled(engine, request):
    """Prefill there; return the request with its first token, and its handle."""
    engine.submit(request)
    (token,) = engine.execute(Prefill(request.model, (request.id,))).tokens
    told = msgspec.structs.replace(request, generated_token_ids=(token.token_id,))
    return told, engine.hand_over(request.id)


def decode(engine, request):
    tokens = list(request.generated_token_ids)
    while True:
        (token,) = engine.execute(Decode(request.model, (request.id,))).tokens
        tokens.append(token.token_id)
        if token.finish_reason is not None:
            return tokens


def kv_path(engine):
    """Where the pool is that it shares."""
    return (engine._kv._host if isinstance(engine._kv, SwappedKv) else engine._kv.pool).name


def blocks_in_pool(engine, request):
    """The blocks of a request in the pool that is shared."""
    sequence = engine._sequences.get(request)
    if isinstance(engine._kv, SwappedKv):
        return tuple(engine._kv._copies[sequence.order].blocks)
    return tuple(sequence.blocks)


@pytest.mark.parametrize("model", ["a", "b"])
@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0.0), SAMPLED])
def test_tokens_are_the_same_after_a_hand_over(engines, model, sampling):
    request = make_request("r", PROMPT, model=model, sampling=sampling, max_tokens=30)
    runner = Runner(make_engine())
    runner.submit(request)
    expected = runner.finish()["r"]
    first, second = engines
    told, kv = prefilled(first, request)
    assert kv.cached_tokens == len(PROMPT) and kv.kv_bytes == all_kv_bytes(first)
    second.adopt(told, kv)
    first.release("r")
    assert (all_kv_bytes(first), all_kv_bytes(second)) == (0, kv.kv_bytes)
    assert decode(second, told) == expected
    assert all_kv_bytes(second) == 0


def test_adopted_kv_is_not_computed_again(engines):
    first, second = engines
    told, kv = prefilled(first, make_request("r", PROMPT))
    second.adopt(told, kv)
    sequence = second._sequences.get("r")
    assert (sequence.cached, sequence.tokens) == (len(PROMPT), len(PROMPT) + 1)
    assert blocks_in_pool(second, "r") == kv.blocks


def test_a_sequence_that_is_handed_over_yields_its_blocks_to_nobody(engines):
    first, second = engines
    older = "stuv"  # more than there is room for
    for name in older:
        first.submit(make_request(name, [1] * 590, max_tokens=5))
    told, kv = prefilled(first, make_request("r", PROMPT))
    for model in "ba":  # also at its model's next turn
        first.execute(Switch(model))
    yielded = [first.execute(Prefill("a", (name,))).preempted for name in older]
    assert "r" not in itertools.chain(*yielded)
    second.adopt(told, kv)
    assert all_kv_bytes(second) == kv.kv_bytes


def test_an_offer_that_was_taken_back_is_gone_though_its_blocks_are_used_again(engines):
    first, second = engines
    told, kv = prefilled(first, make_request("r", PROMPT))
    first.release("r")
    other, again = prefilled(first, make_request("s", PROMPT[::-1]))
    assert set(again.blocks) & set(kv.blocks)
    with pytest.raises(KvGone, match="prefill again"):
        second.adopt(told, kv)
    second.submit(told)  # it is not known there, so this is how it goes on
    second.adopt(other, again)


@pytest.mark.parametrize("is_named", [False, True])
def test_what_nobody_took_goes_on_with_the_same_tokens(engines, is_named):
    first, second = engines
    request = make_request("r", PROMPT, max_tokens=30)
    runner = Runner(make_engine())
    runner.submit(request)
    expected = runner.finish()["r"]
    first.submit(request)
    (token,) = first.execute(Prefill("a", ("r",))).tokens
    told = msgspec.structs.replace(request, generated_token_ids=(token.token_id,))
    first.set_apart("r")
    kv = first.hand_over("r") if is_named else None
    assert first.resume("r")
    if kv is not None:
        with pytest.raises(KvGone):
            second.adopt(told, kv)
    first.execute(Switch("a"))
    assert decode(first, told) == expected
    assert all_kv_bytes(first) == 0


def test_what_somebody_took_does_not_go_on_here(engines):
    first, second = engines
    told, kv = prefilled(first, make_request("r", PROMPT))
    second.adopt(told, kv)
    assert not first.resume("r")
    first.release("r")
    assert (all_kv_bytes(first), all_kv_bytes(second)) == (0, kv.kv_bytes)
    assert len(decode(second, told)) == told.max_tokens


def test_kv_is_adopted_once(engines):
    first, second = engines
    third = make_engine(kv_path=kv_path(first), kv_bytes=1 << 20)
    told, kv = prefilled(first, make_request("r", PROMPT))
    second.adopt(told, kv)
    with pytest.raises(KvGone):
        third.adopt(told, kv)
    third.close()


def test_a_private_pool_and_another_layout_are_refused(engines):
    told, kv = prefilled(make_engine(), make_request("r", PROMPT))
    with pytest.raises(KvGone, match="another pool"):
        make_engine().adopt(told, kv)
    first, second = engines
    told, kv = prefilled(first, make_request("r", PROMPT))
    with pytest.raises(KvGone, match="another layout"):
        second.adopt(msgspec.structs.replace(told, model="b"), kv)


def test_kv_in_the_memory_of_a_device_is_out_of_reach_and_goes_by_the_host(engines):
    first, second = engines
    told, kv = prefilled(first, make_request("r", PROMPT))
    there = DeviceKv("cuda:0", 1, b"", 1 << 30, 0, (0, 8, 16))
    with pytest.raises(KvUnreachable, match="in the memory of cuda:0"):
        second.adopt(told, msgspec.structs.replace(kv, device=there))
    second.adopt(told, first.hand_over("r", by_host=True))
    first.release("r")
    assert len(decode(second, told)) == told.max_tokens


@pytest.mark.parametrize(
    "change",
    [{"blocks": (1 << 40,)}, {"blocks": (-1,)}, {"blocks": (1,)}, {"owner": -1},
     {"cached_tokens": 0}, {"cached_tokens": 10_000}, {"cached_tokens": len(PROMPT) + 1}],
)  # fmt: skip
def test_a_handle_that_makes_no_sense_is_kv_that_is_gone(engines, change):
    first, second = engines
    told, kv = prefilled(first, make_request("r", PROMPT))
    wrong = msgspec.structs.replace(kv, **change)
    with pytest.raises(KvGone, match="prefill again"):
        second.adopt(told, wrong)
    second.adopt(told, kv)


def test_kv_without_room_for_it_stays_where_it_is(engines):
    first, _ = engines
    told, kv = prefilled(first, make_request("r", PROMPT))
    small = make_engine(kv_path=kv_path(first), kv_bytes=1 << 20)
    small.submit(make_request("s", [1] * 590, max_tokens=5))
    small.execute(Prefill("a", ("s",)))
    while True:
        try:
            small.adopt(told, kv)
        except OutOfBlocks:
            break
        told, kv = prefilled(first, make_request(f"r{kv.owner}", PROMPT))
    third = make_engine(kv_path=kv_path(first), kv_bytes=1 << 20)
    third.adopt(told, kv)
    small.close()
    third.close()


def test_a_request_that_cannot_be_served_is_not_adopted(engines):
    first, second = engines
    told, kv = prefilled(first, make_request("r", PROMPT))
    with pytest.raises(ContextLengthExceeded):
        second.adopt(msgspec.structs.replace(told, prompt_token_ids=(1,) * 600), kv)
    second.adopt(told, kv)
