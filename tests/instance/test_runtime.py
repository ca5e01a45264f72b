"""The instance's loop without threads: a local domain, a NullEngine, lanes that end when told."""

import pytest

from aegaeon.engine.base import EngineUsage, null_token
from aegaeon.errors import ContextLengthExceeded, StaleIncarnation
from aegaeon.instance.outbox import GONE_S
from aegaeon.measures import PhaseTotal
from aegaeon.metrics import Target
from aegaeon.store.codec import decode_replies
from aegaeon.types import (
    Cancel,
    Decode,
    Drain,
    LoadFailed,
    Prefill,
    RequestFailed,
    TokenEvent,
    WeightsLost,
)
from tests.support.bench import Bench
from tests.support.specs import make_request


def test_tokens_come_back_in_order_with_their_positions():
    bench = Bench()
    request = bench.submit("r", max_tokens=4)
    bench.work()
    replies = bench.replies()
    assert [type(reply) for reply in replies] == [TokenEvent] * 4
    assert [reply.position for reply in replies] == [0, 1, 2, 3]
    expected = [(null_token(request, position, 1000),) for position in range(4)]
    assert [reply.token_ids for reply in replies] == expected
    assert [reply.finish_reason for reply in replies] == [None, None, None, "length"]
    assert bench.held_kv() == 0


def test_a_resumed_request_continues_behind_its_tokens():
    bench = Bench()
    whole = make_request("r", "a", max_tokens=4)
    first = tuple(null_token(whole, position, 1000) for position in range(2))
    bench.submit("r", max_tokens=4, generated_token_ids=first, attempt=1)
    bench.work()
    replies = bench.replies()
    assert [(reply.position, reply.attempt) for reply in replies] == [(2, 1), (3, 1)]
    assert replies[0].token_ids == (null_token(whole, 2, 1000),)


def test_two_models_interleave_with_the_tokens_of_each_alone():
    def tokens(bench):
        made = {}
        for reply in bench.replies():
            made.setdefault(reply.request_id, []).extend(reply.token_ids)
        return made

    alone = {}
    for model in ("a", "b"):
        bench = Bench()
        bench.submit(model, model, max_tokens=60)
        bench.work(100)
        alone.update(tokens(bench))
    both = Bench(target=Target(0.01, 0.0025), step_s=0.001)
    for model in ("a", "b"):
        both.submit(model, model, max_tokens=60)
    both.work(300)
    assert tokens(both) == alone
    assert both.status().switches > 4


@pytest.mark.parametrize("stage", ["before load", "loading", "in the action", "running"])
def test_cancel_frees_the_sequence_in_every_state(stage):
    bench = Bench()
    bench.submit("r", max_tokens=1000)
    if stage == "loading":
        bench.turn()
        assert bench.copy.is_busy
    elif stage == "in the action":
        bench.until(Prefill)
    elif stage == "running":
        bench.work()
        bench.compute.finish()
    bench.replies()
    bench.send(Cancel("r"))
    bench.turn()
    bench.compute.finish()
    bench.turn()
    assert bench.held_kv() == 0
    bench.work()
    assert bench.replies() == []
    assert bench.status().waiting == {} and bench.status().running == {}


def test_the_time_is_counted_that_requests_wait_for_a_load():
    bench = Bench()
    bench.now = 1.0
    bench.turn()
    bench.submit("r", max_tokens=2)
    bench.turn()
    assert bench.copy.is_busy and not bench.compute.is_busy
    bench.now = 3.0
    bench.copy.finish()
    bench.work()
    assert bench.status().stall_s == pytest.approx(2.0, abs=0.01)


def test_a_request_past_its_deadline_fails_with_timeout():
    bench = Bench()
    bench.submit("r", deadline_s=5.0, max_tokens=1000)
    bench.turn()
    bench.now = 5.0
    bench.turn()
    (reply,) = bench.replies()
    assert isinstance(reply, RequestFailed) and reply.code == "timeout"
    assert bench.held_kv() == 0


def test_bad_requests_fail_alone():
    bench = Bench(max_waiting=2)
    bench.submit("long", prompt_token_ids=(1,) * 5000)
    bench.submit("unknown", "zzz")
    for number in range(3):
        bench.submit(f"r{number}")
    bench.work()
    failed = {r.request_id: r.code for r in bench.replies() if isinstance(r, RequestFailed)}
    assert failed == {
        "long": ContextLengthExceeded.code,
        "unknown": "model_not_found",
        "r2": "overloaded",
    }


def test_malformed_messages_are_dropped():
    bench = Bench()
    bench.domain.open_mailbox("i.1").send(b"\xc1 nonsense")
    bench.submit("r")
    bench.work()
    assert len(bench.replies()) == 4


def test_a_repeated_submit_changes_nothing():
    bench = Bench()
    bench.submit("r")
    bench.submit("r")
    bench.work()
    assert len(bench.replies()) == 4


def test_a_next_attempt_replaces_the_one_in_the_running_action():
    bench = Bench()
    bench.submit("r", max_tokens=3)
    bench.until(Prefill)
    bench.submit("r", max_tokens=3, attempt=1)
    bench.work()
    assert [(r.attempt, r.position) for r in bench.replies()] == [(1, 0), (1, 1), (1, 2)]


def test_a_late_older_attempt_does_not_replace_one_that_waits_for_the_running_action():
    bench = Bench()
    bench.submit("r", max_tokens=3)
    bench.until(Prefill)
    bench.submit("r", max_tokens=3, attempt=2)
    bench.turn()
    bench.submit("r", max_tokens=3, attempt=1)
    bench.work()
    assert [(r.attempt, r.position) for r in bench.replies()] == [(2, 0), (2, 1), (2, 2)]


def test_a_next_attempt_that_waits_when_the_drain_ends_is_told():
    bench = Bench()
    bench.submit("r", max_tokens=3)
    bench.until(Prefill)
    bench.submit("r", max_tokens=3, attempt=1)
    bench.turn()
    bench.runtime.drain()
    bench.turn()
    while not bench.runtime.is_drained:
        bench.now += 1.0
        bench.turn()
    assert [(r.attempt, r.code) for r in bench.replies()] == [(1, "draining")]


def test_a_load_that_is_put_off_for_long_answers_the_models_requests():
    bench = Bench()
    bench.copy.run = lambda load: WeightsLost(load.model)
    bench.submit("r", "a")
    for _ in range(150):
        bench.work()
        bench.now += 1.0
    (failed,) = bench.replies()
    assert (failed.code, "long in coming" in failed.message) == ("model_loading", True)


def test_a_load_that_fails_answers_the_models_requests():
    bench = Bench()
    good_load = bench.copy.run
    bench.copy.run = lambda load: (
        LoadFailed("a", "checkpoint_error", "gone") if load.model == "a" else good_load(load)
    )
    bench.submit("r")
    bench.submit("s", "b")
    bench.work()
    replies = bench.replies()
    assert [r.request_id for r in replies if isinstance(r, RequestFailed)] == ["r"]
    assert len([r for r in replies if r.request_id == "s"]) == 4
    assert bench.held_kv() == 0


@pytest.mark.parametrize("kind", [Prefill, Decode])
def test_weights_that_were_evicted_come_back_and_no_token_is_lost(kind):
    bench = Bench()
    request = bench.submit("r", max_tokens=4)
    bench.until(kind)
    bench.engine.spoil(WeightsLost("a"))
    bench.work()
    replies = bench.replies()
    assert [reply.token_ids[0] for reply in replies] == [
        null_token(request, position, 1000) for position in range(4)
    ]


def test_a_load_that_fails_while_it_computes_answers_the_models_requests():
    bench = Bench()
    bench.submit("r")
    bench.submit("s", "b")
    bench.until(Prefill)
    model = bench.compute.action.model
    failed = {"a": "r", "b": "s"}[model]
    bench.engine.spoil(LoadFailed(model, "checkpoint_error", "layer 17"))
    bench.work(60)
    replies = bench.replies()
    failures = [r for r in replies if isinstance(r, RequestFailed)]
    assert [(r.request_id, r.code) for r in failures] == [(failed, "checkpoint_error")]
    assert len([r for r in replies if isinstance(r, TokenEvent)]) == 4
    assert bench.held_kv() == 0


def test_replies_wait_for_room_in_a_full_mailbox():
    bench = Bench()
    reader = bench.domain.create_mailbox("small", 200)
    bench.submit("r", max_tokens=20, reply_to="small")
    bench.work(60)
    positions = []
    for _ in range(20):
        for record in reader.receive(0.0):
            positions += [reply.position for reply in decode_replies(record)]
        bench.turn()
    assert positions == list(range(20))


def test_a_proxy_that_is_gone_has_its_requests_cancelled():
    bench = Bench()
    bench.submit("r", max_tokens=1000)
    bench.submit("s", max_tokens=1000, reply_to="nobody")
    bench.work(10)
    assert bench.status().running == {"a": 1}
    bench.proxy.close()
    bench.work(10)
    assert bench.status().running == {}


def test_a_proxy_that_takes_nothing_for_long_is_gone():
    bench = Bench()
    bench.domain.create_mailbox("small", 200)
    bench.submit("r", max_tokens=1000, reply_to="small")
    bench.work(20)
    for _ in range(3):
        bench.now += GONE_S / 2 + 0.1
        bench.turn()
    bench.compute.finish()
    bench.turn()
    assert bench.held_kv() == 0


def test_a_drain_refuses_new_requests_and_ends_running_ones():
    bench = Bench()
    bench.submit("r", max_tokens=4)
    bench.until(Prefill)
    bench.send(Drain())
    bench.turn()
    assert bench.status().state == "draining"
    bench.submit("s")
    bench.turn()
    assert not bench.runtime.is_drained
    bench.work()
    replies = bench.replies()
    assert [r.code for r in replies if isinstance(r, RequestFailed)] == ["draining"]
    assert len([r for r in replies if isinstance(r, TokenEvent)]) == 4
    assert bench.runtime.is_drained


def test_a_drain_that_takes_too_long_fails_what_is_left():
    bench = Bench()
    bench.submit("r", max_tokens=1000)
    bench.until(Prefill)
    bench.runtime.drain()
    bench.turn()
    bench.now += 5.1
    bench.turn()
    (reply,) = bench.replies()
    assert reply.code == "draining"
    assert bench.runtime.is_drained


def test_the_lease_is_kept_alive_by_an_idle_loop():
    bench = Bench(lease_s=8.0)
    for _ in range(40):
        bench.now += 1.0
        bench.turn()
    assert bench.status().state == "ready"


def test_a_lost_lease_ends_the_instance():
    bench = Bench(lease_s=8.0)
    bench.turn()
    bench.now += 9.0
    with pytest.raises(StaleIncarnation):
        bench.turn()


def test_the_status_tells_what_the_engine_holds_and_has_moved(monkeypatch):
    bench = Bench()
    moved = {"weights": PhaseTotal(2, 300, 0.5)}
    usage = EngineUsage(100, 1000, 0, 1000, moved)
    monkeypatch.setattr(bench.engine, "usage", lambda: usage)
    bench.turn()
    assert (bench.status().weight_bytes, bench.status().moved) == (100, moved)


def test_the_status_tells_of_work_and_residency():
    bench = Bench()
    bench.submit("r", "b", max_tokens=1000)
    bench.turn()
    bench.now += 0.1
    bench.turn()
    assert bench.status().loading == "b" and bench.status().waiting == {"b": 1}
    bench.work()
    assert bench.status().resident == ("b",) and bench.status().current == "b"
    assert bench.status().running == {"b": 1}
