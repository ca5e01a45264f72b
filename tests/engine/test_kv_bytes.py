"""KV that goes as bytes from an engine to another one that shares no memory: the same tokens."""

import itertools

import msgspec
import pytest

from aegaeon.errors import KvGone, OutOfBlocks
from aegaeon.types import Decode, Prefill, SamplingParams
from tests.support.decoder import DEVICES, all_kv_bytes, make_engine, make_request
from tests.support.runner import Runner

SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, seed=7)


@pytest.fixture(params=list(itertools.product(DEVICES, DEVICES)), ids=" to ".join)
def engines(request):
    """Two engines with pools of their own, the sender's device first."""
    made = [make_engine(kv_bytes=1 << 20, device=device) for device in request.param]
    yield made
    for engine in made:
        engine.close()


def begun(engine, request, tokens):
    """Run a request there for some tokens; return it with those, set apart."""
    engine.submit(request)
    made = list(engine.execute(Prefill(request.model, (request.id,))).tokens)
    while len(made) < tokens:
        made += engine.execute(Decode(request.model, (request.id,))).tokens
    engine.set_apart(request.id)
    return msgspec.structs.replace(
        request, generated_token_ids=tuple(token.token_id for token in made)
    )


def brought(first, second, request):
    """Bring the KV of a request as bytes; return the room where it is."""
    exposed = first.exchange.expose(request.id)
    room = second.exchange.make_room(request.model, exposed.kv)
    data = b"".join(exposed.views)
    assert len(data) == exposed.kv.kv_bytes == sum(map(len, room.views))
    for view in room.views:
        view[:], data = data[: len(view)], data[len(view) :]
    return room


def rest_of(engine, request):
    tokens = list(request.generated_token_ids)
    while True:
        (token,) = engine.execute(Decode(request.model, (request.id,))).tokens
        tokens.append(token.token_id)
        if token.finish_reason is not None:
            return tokens


@pytest.mark.parametrize("model", ["a", "b"])
@pytest.mark.parametrize(("prompt", "before"), [(40, 1), (15, 1), (16, 9), (31, 17)])
def test_tokens_are_the_same_whenever_it_goes(engines, model, prompt, before):
    first, second = engines
    sampling = SAMPLED if prompt == 31 else SamplingParams(temperature=0.0)
    request = make_request(
        "r", list(range(prompt)), model=model, sampling=sampling, max_tokens=before + 12
    )
    runner = Runner(make_engine())
    runner.submit(request)
    expected = runner.finish()["r"]
    told = begun(first, request, before)
    room = brought(first, second, told)
    second.adopt(told, room.kv, room)
    first.release("r")
    sequence = second._sequences.get("r")
    assert (sequence.cached, sequence.tokens) == (prompt + before - 1, prompt + before)
    assert rest_of(second, told) == expected
    assert (all_kv_bytes(first), all_kv_bytes(second)) == (0, 0)


def test_what_is_exposed_goes_on_where_it_was(engines):
    first, second = engines
    request = make_request("r", list(range(40)), max_tokens=20)
    told = begun(first, request, 3)
    room = brought(first, second, told)
    second.exchange.free(room)
    assert all_kv_bytes(second) == 0
    assert first.resume("r")
    assert len(rest_of(first, told)) == 20


def test_a_request_that_cannot_be_served_leaves_the_room_to_who_made_it(engines):
    first, second = engines
    told = begun(first, make_request("r", list(range(40))), 1)
    room = brought(first, second, told)
    short = msgspec.structs.replace(told, prompt_token_ids=(1, 2), generated_token_ids=())
    with pytest.raises(KvGone, match="prefill again"):
        second.adopt(short, room.kv, room)
    second.exchange.free(room)
    assert all_kv_bytes(second) == 0


@pytest.mark.parametrize(
    "change",
    [{"shape": ()}, {"shape": (1, 2, 3, 4)}, {"cached_tokens": 0}, {"cached_tokens": -5},
     {"cached_tokens": 1 << 60}, {"kv_bytes": 0}, {"kv_bytes": -1}],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_kv_that_is_gone(change):
    engine = make_engine(kv_bytes=1 << 20)
    told = begun(engine, make_request("r", list(range(40))), 1)
    exposed = engine.exchange.expose(told.id)
    with pytest.raises(KvGone, match="prefill again"):
        engine.exchange.make_room("a", msgspec.structs.replace(exposed.kv, **change))
    with pytest.raises(KvGone):
        engine.exchange.make_room("unknown", exposed.kv)
    engine.close()


def test_there_may_be_no_room_and_nothing_to_expose():
    engine = make_engine(kv_bytes=1 << 20)
    told = begun(engine, make_request("r", list(range(40))), 1)
    kv = engine.exchange.expose(told.id).kv
    rooms = []
    with pytest.raises(OutOfBlocks):
        while True:
            rooms.append(engine.exchange.make_room("a", kv))
    for room in rooms:
        engine.exchange.free(room)
    engine.submit(make_request("s", [1, 2, 3]))
    assert engine.exchange.expose("s") is None
    assert engine.exchange.expose("nobody") is None
    engine.close()
