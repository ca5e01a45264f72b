"""What sequences begin with, where they are handed over: kept here, copied for the receiver."""

import msgspec
import pytest

from aegaeon.types import Prefill, Switch
from tests.engine.test_prefixes import SYSTEM, assert_nothing_is_held, run, undisturbed, words
from tests.support.decoder import DEVICES, SHAPES, make_engine, make_request
from tests.support.runner import Runner


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("room", ["enough", "none"])
def test_what_is_handed_over_is_found_again_at_the_sender(device, room, tmp_path):
    path = str(tmp_path / "pool")
    first, second = (make_engine(kv_path=path, kv_bytes=1 << 20, device=device) for _ in range(2))
    request = make_request("1", SYSTEM)
    first.submit(request)
    (token,) = first.execute(Prefill("a", ("1",))).tokens
    told = msgspec.structs.replace(request, generated_token_ids=(token.token_id,))
    shared = first._kv._kept.pool if device == "staged" else first._kv.pool
    held = []
    if room == "none":
        first.execute(Switch("b"))  # so that on "staged" it is on the host
        held = shared.allocate(SHAPES["a"], shared.free_blocks(SHAPES["a"]))
    handle = first.hand_over("1")
    second.adopt(told, handle)
    first.release("1")
    shared.free(SHAPES["a"], held)
    runner = Runner(second)
    runner.go_on("1", "a", [token.token_id])
    assert runner.finish() == undisturbed(request)
    again = make_request("2", SYSTEM)
    assert run(first, again) == undisturbed(again)
    assert first.usage().found_tokens > 0  # where there was no room for copies, at the receiver
    for engine in (first, second):
        assert_nothing_is_held(engine)
        engine.close()


def test_shared_blocks_are_copied_for_the_receiver_while_others_compute(tmp_path, monkeypatch):
    path = str(tmp_path / "pool")
    first, second = (make_engine(kv_path=path, kv_bytes=1 << 20) for _ in range(2))
    request, other = make_request("1", SYSTEM), make_request("2", SYSTEM)
    first.submit(request)
    (token,) = first.execute(Prefill("a", ("1",))).tokens
    first.submit(other)
    copy, made = first._kv.pool.copy, []

    def compute_meanwhile(*blocks):
        assert not first._lock.locked()
        if not made:
            monkeypatch.undo()
            made.extend(first.execute(Prefill("a", ("2",))).tokens)
            monkeypatch.setattr(first._kv.pool, "copy", compute_meanwhile)
        copy(*blocks)

    monkeypatch.setattr(first._kv.pool, "copy", compute_meanwhile)
    handle = first.hand_over("1")
    monkeypatch.undo()
    assert made and handle.blocks
    told = msgspec.structs.replace(request, generated_token_ids=(token.token_id,))
    second.adopt(told, handle)
    first.release("1")
    runners = Runner(first), Runner(second)
    runners[0].go_on("2", "a", [made[0].token_id])
    runners[1].go_on("1", "a", [token.token_id])
    assert runners[0].finish() | runners[1].finish() == undisturbed(request, other)
    for engine in (first, second):
        assert_nothing_is_held(engine)
        engine.close()


def test_what_is_freed_while_it_is_copied_for_others_is_not_offered(tmp_path, monkeypatch):
    engine = make_engine(kv_path=str(tmp_path / "pool"), kv_bytes=1 << 20)
    engine.submit(make_request("1", SYSTEM))
    engine.execute(Prefill("a", ("1",)))
    monkeypatch.setattr(engine._kv.pool, "copy", lambda *_: engine.release("1"))
    assert not engine.hand_over("1").blocks
    assert_nothing_is_held(engine)
    engine.close()


@pytest.mark.parametrize("device", DEVICES)
def test_one_that_is_set_apart_yields_to_nobody(device, tmp_path):
    path = str(tmp_path / "pool")
    first, second = (make_engine(kv_path=path, kv_bytes=1 << 20, device=device) for _ in range(2))
    request = make_request("1", SYSTEM)
    for name in "stuv":  # older, and more than there is room for
        first.submit(make_request(name, words(590, name), max_tokens=5))
    first.submit(request)
    (token,) = first.execute(Prefill("a", ("1",))).tokens
    first.set_apart("1")
    for name in "stuv":
        for model in "ba":
            first.execute(Switch(model))
        assert "1" not in first.execute(Prefill("a", (name,))).preempted
    told = msgspec.structs.replace(request, generated_token_ids=(token.token_id,))
    second.adopt(told, first.hand_over("1"))
    first.release("1")
    runner = Runner(second)
    runner.go_on("1", "a", [token.token_id])
    assert runner.finish() == undisturbed(request)


def test_what_two_use_is_not_given_away_without_a_copy(tmp_path):
    path = str(tmp_path / "pool")
    engine, other = (make_engine(kv_path=path, kv_bytes=1 << 20) for _ in range(2))
    requests = [make_request(str(n), SYSTEM, max_tokens=20) for n in range(2)]
    tokens = []
    for request in requests:
        engine.submit(request)
        tokens += engine.execute(Prefill("a", (request.id,))).tokens
    pool = engine._kv.pool
    held = pool.allocate(SHAPES["a"], pool.free_blocks(SHAPES["a"]))
    assert not engine.hand_over("0").blocks
    pool.free(SHAPES["a"], held)
    engine.release("0")
    runner = Runner(engine)
    runner.go_on("1", "a", [tokens[1].token_id])
    assert runner.finish() == undisturbed(requests[1])
    for one in (engine, other):
        one.close()
