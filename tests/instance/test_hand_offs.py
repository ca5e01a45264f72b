"""Requests that go from instance to instance, over a shared pool, whoever dies or says nothing."""

import pytest

from aegaeon.errors import HandoffLost
from aegaeon.instance.departures import GRACE_S
from aegaeon.instance.ways import OFFER_S
from aegaeon.store.codec import decode_instance_message, decode_replies, encode
from aegaeon.types import (
    Accepted,
    Cancel,
    Declined,
    Drain,
    KvHandle,
    Moved,
    Prefill,
    Submit,
    TokenEvent,
    Transfer,
)
from tests.support.node import Node, assert_empty, assert_served, settle, until
from tests.support.specs import make_request


def make_node(**roles):
    return Node(**(roles or {"p": "prefill", "d": "decode"}))


def offered(node, name):
    """The transfers that wait in an instance's mailbox."""
    records = node.lives[name].inbox._queue.records
    messages = [decode_instance_message(record) for record in records]
    return [message for message in messages if isinstance(message, Transfer)]


def until_offered(node, names="d"):
    """Go on, all but p being slow, until a transfer waits for one of `names`; return whom."""
    for _ in range(100):
        node.now += 0.001
        node.lives["p"].turn()
        node.lives["p"].finish()
        node.proxy.pump()
        for name in names:
            if offered(node, name):
                return name
    raise AssertionError("nothing was offered")


def ready(node):
    node.step(0.1)
    node.step(0.1)
    return node


def test_a_request_is_prefilled_here_and_decoded_there():
    node = make_node()
    for number in range(4):
        node.proxy.ask(f"r{number}", "ab"[number % 2])
    settle(node)
    assert_served(node)
    tokens = [reply for reply in node.proxy.replies if isinstance(reply, TokenEvent)]
    assert {reply.instance for reply in tokens if reply.position == 0} == {"p"}
    assert {reply.instance for reply in tokens if reply.position > 0} == {"d"}


def test_kv_is_handed_over_while_the_next_request_computes():
    node = ready(make_node())
    life, seen, apart = node.lives["p"], [], []
    hand_over = life.engine.hand_over

    def noted(request, by_host=False):
        seen.append((request, life.compute.action))
        return hand_over(request, by_host)

    life.engine.hand_over = noted
    life.engine.set_apart = lambda request: apart.append((request, life.compute.action))
    node.proxy.ask("r")
    until(node, lambda: isinstance(life.compute.action, Prefill))
    node.proxy.ask("s")
    node.proxy.pump()
    life.turn()
    assert apart == [("r", None)]  # first, so that nothing takes its blocks
    assert seen == [("r", Prefill("a", ("s",)))]
    settle(node)
    assert_served(node)


def test_no_kv_is_computed_twice():
    node = make_node()
    steps = []
    run = node.lives["d"].compute.run
    node.lives["d"].compute.run = lambda action: (steps.append(action), run(action))[1]
    node.proxy.ask("r")
    settle(node)
    assert_served(node)
    assert steps and not any(isinstance(action, Prefill) for action in steps)


def test_the_proxy_hears_of_the_move_before_the_next_token():
    node = make_node()
    node.proxy.ask("r", max_tokens=3)
    settle(node)
    kinds = [type(reply) for reply in node.proxy.replies]
    assert kinds == [TokenEvent, Moved, TokenEvent, TokenEvent]


def test_nothing_is_offered_while_its_tokens_have_not_left():
    node = ready(make_node())
    full = node.domain.create_mailbox("full", 250)
    node.domain.open_mailbox("full").send(b"x" * 150)
    node.domain.open_mailbox("p.1").send(encode_submit("r", reply_to="full"))
    node.work(10)
    assert not offered(node, "d") and node.lives["d"].scheduler.snapshot().running == {}
    full.receive(0.0)
    node.step()
    assert node.lives["d"].scheduler.snapshot().running or offered(node, "d")


def encode_submit(name, **changes):
    return encode(Submit(make_request(name, "a", **{"max_tokens": 50, **changes})))


def test_without_a_decoder_a_request_waits_until_one_comes():
    node = make_node()
    node.kill("d")
    node.proxy.ask("r")
    node.work(100)
    assert len(node.proxy.got["r"]) == 1
    node.start("d")
    settle(node)
    assert_served(node)


def test_a_waiting_request_ends_at_its_deadline():
    node = make_node()
    node.kill("d")
    node.proxy.ask("r", timeout_s=2.0)
    node.work(100)
    assert [reply.code for reply in node.proxy.failures()] == ["timeout"]
    assert_empty(node)


@pytest.mark.parametrize("stage", ["waiting", "offered", "accepted", "decoding"])
def test_a_cancel_frees_the_request_in_every_stage(stage):
    node = ready(make_node())
    if stage == "waiting":
        node.kill("d")
    node.proxy.ask("r", max_tokens=1000)
    if stage == "waiting":
        node.work(20)
    elif stage == "decoding":
        node.work(20)
        assert len(node.proxy.got["r"]) > 3
    else:
        until_offered(node)
        if stage == "accepted":  # the proxy does not know it yet
            node.lives["d"].turn()
            node.lives["p"].turn()
    node.proxy.leave("r")
    node.work(4)
    assert_empty(node)


def test_the_kv_of_a_cancelled_offer_is_not_reused_before_it_is_answered():
    node = ready(make_node())
    node.proxy.ask("r")
    until_offered(node)
    node.proxy.leave("r")
    node.proxy.ask("other")
    for _ in range(5):
        node.proxy.pump()
        node.lives["p"].turn()
        node.lives["p"].finish()
    settle(node)
    assert_served(node)


def test_a_full_decoder_makes_requests_wait_and_loses_none():
    node = Node(quota=2, p="prefill", d="decode")
    for number in range(8):
        node.proxy.ask(f"r{number}", "ab"[number % 2], max_tokens=8)
    settle(node, 1500)
    assert_served(node)
    assert node.proxy.failures() == []


def test_a_decoder_that_declines_is_passed_over():
    node = ready(make_node(p="prefill", d="decode", e="decode"))
    node.proxy.ask("r")
    chosen = until_offered(node, "de")
    node.lives[chosen].runtime.drain()
    settle(node)
    assert_served(node)
    (other,) = {"d", "e"} - {chosen}
    assert {r.instance for r in node.proxy.replies if isinstance(r, Moved)} == {other}


@pytest.mark.parametrize("is_taken", [False, True])
def test_a_decoder_that_dies_with_an_offer_is_replaced_at_once(is_taken):
    node = ready(make_node(p="prefill", d="decode"))
    node.proxy.ask("r")
    until_offered(node)
    if is_taken:
        node.lives["d"].turn()
        node.drop_answer("p")
    node.kill("d")
    node.start("d")
    began_s = node.now
    settle(node)
    assert_served(node)
    last_s = node.proxy.opened["r"].take()
    assert last_s.received_s - began_s < 1.0


def test_a_decoder_that_never_answers_costs_a_new_attempt():
    node = ready(make_node())
    node.proxy.ask("r")
    until_offered(node)
    assert node.drop_answer("d", Transfer)
    settle(node)
    assert [reply.code for reply in node.proxy.failures()] == [HandoffLost.code]
    assert node.proxy.opened["r"].attempt == 1
    assert_served(node)


def test_a_lost_answer_harms_nobody():
    node = ready(make_node())
    node.proxy.ask("r", max_tokens=400)
    until_offered(node)
    node.lives["d"].turn()
    assert node.drop_answer("p", Accepted)
    node.work(300)
    settle(node, 800)
    assert_served(node)
    assert node.proxy.opened["r"].attempt == 0


def test_a_late_taker_takes_nothing():
    node = ready(make_node())
    node.proxy.ask("r")
    until_offered(node)
    while node.now < 100.0 + OFFER_S + GRACE_S + 1.0:  # the decoder sleeps, its lease runs on
        node.now += 0.1
        node.lives["p"].turn()
        node.lives["p"].finish()
    settle(node)
    assert_served(node)
    assert not any(isinstance(r, Moved) and r.attempt == 0 for r in node.proxy.replies)


def test_a_dead_senders_offer_is_taken_or_its_request_placed_again():
    for is_noticed_first in (False, True):
        node = ready(make_node())
        node.proxy.ask("r")
        until_offered(node)
        node.kill("p")
        node.start("p")
        if is_noticed_first:
            node.proxy.pump()
        settle(node)
        assert_served(node)


def lending_node(is_apart, **roles):
    node = ready(make_node(**roles))
    node.lives["p"].engine.is_lending = True
    for name in roles:
        node.lives[name].engine.is_apart = is_apart
    return node


def test_kv_that_another_instance_reaches_goes_as_it_is():
    node = lending_node(False, p="prefill", d="decode")
    for number in range(3):
        node.proxy.ask(f"r{number}")
    settle(node)
    assert_served(node)
    assert node.lives["p"].engine.is_lending
    assert node.lives["p"].engine.lent == ["r0", "r1", "r2"]


def test_kv_that_another_instance_cannot_reach_goes_by_the_host_from_then_on():
    node = lending_node(True, p="prefill", d="decode")
    steps = []
    run = node.lives["d"].compute.run
    node.lives["d"].compute.run = lambda action: (steps.append(action), run(action))[1]
    node.proxy.ask("r")
    settle(node)
    node.proxy.ask("s")
    settle(node)
    assert_served(node)
    assert node.lives["p"].engine.lent == ["r"]
    assert steps and not any(isinstance(action, Prefill) for action in steps)
    assert node.proxy.failures() == []


def test_an_offer_of_lent_kv_that_comes_back_is_named_anew():
    node = lending_node(False, p="prefill", d="decode", e="decode")
    node.proxy.ask("r")
    chosen = until_offered(node, "de")
    node.lives[chosen].runtime.drain()
    settle(node)
    assert_served(node)
    assert node.lives["p"].engine.lent == ["r", "r"]


def test_a_cancel_frees_lent_kv_that_another_instance_cannot_reach():
    node = lending_node(True, p="prefill", d="decode")
    node.proxy.ask("r")
    until_offered(node)
    node.proxy.leave("r")
    node.work(10)
    assert_empty(node)
    assert node.lives["p"].engine.lent == ["r"]


def test_a_repeated_transfer_changes_nothing():
    node = ready(make_node())
    kv = KvHandle(owner=99, blocks=(0,), cached_tokens=3)
    tokens = {"generated_token_ids": (1,), "max_tokens": 3}
    request = make_request("r", "a", reply_to="listener", **tokens)
    listener = node.domain.create_mailbox("listener")
    sender = node.domain.create_mailbox("sender")
    for _ in range(2):
        node.domain.open_mailbox("d.2").send(
            encode(Transfer(request, kv, "sender", node.now + 1.0))
        )
        node.work(10)
    answers = [decode_instance_message(record) for record in sender.receive(0.0)]
    assert answers == [Accepted("r", 0, "d")] * 2
    replies = [one for record in listener.receive(0.0) for one in decode_replies(record)]
    assert [type(reply) for reply in replies] == [Moved, TokenEvent, TokenEvent]
    assert_empty(node)


def test_transfers_to_the_wrong_or_too_late_are_declined():
    node = ready(make_node())
    kv = KvHandle(owner=99, blocks=(0,), cached_tokens=3)
    sender = node.domain.create_mailbox("sender")
    request = make_request("r", "a")
    node.domain.open_mailbox("p.1").send(encode(Transfer(request, kv, "sender", node.now + 1.0)))
    node.domain.open_mailbox("d.2").send(encode(Transfer(request, kv, "sender", node.now)))
    node.step()
    answers = [decode_instance_message(record) for record in sender.receive(0.0)]
    assert {type(answer) for answer in answers} == {Declined}
    assert {answer.code for answer in answers} == {"invalid_value", "overloaded"}
    assert_empty(node)


def test_a_cancel_of_an_earlier_attempt_leaves_the_later_one():
    node = ready(make_node())
    node.domain.open_mailbox("p.1").send(encode_submit("r", attempt=1))
    node.step()
    node.domain.open_mailbox("p.1").send(encode(Cancel("r", 0)))
    node.step()
    assert node.lives["p"].scheduler.snapshot().waiting == {"a": 1}
    node.domain.open_mailbox("p.1").send(encode(Cancel("r", 1)))
    node.step()
    assert_empty(node)


def test_a_next_attempt_waits_for_what_became_of_the_offer():
    node = ready(make_node())
    listener = node.domain.create_mailbox("listener")
    asked = {"reply_to": "listener", "max_tokens": 3}
    node.domain.open_mailbox("p.1").send(encode_submit("r", **asked))
    until_offered(node)
    node.domain.open_mailbox("p.1").send(encode_submit("r", **asked, attempt=1))
    node.work(20)
    replies = [one for record in listener.receive(0.0) for one in decode_replies(record)]
    assert [r.attempt for r in replies if isinstance(r, TokenEvent)] == [0, 1, 1, 1]
    assert_empty(node)


def test_a_prefill_instance_drains_by_handing_over():
    node = ready(make_node())
    node.proxy.ask("r")
    node.proxy.ask("s", "b")
    node.step()
    life = node.lives["p"]
    node.domain.open_mailbox("p.1").send(encode(Drain()))
    until(node, lambda: life.runtime.is_drained)
    node.kill("p")
    settle(node)
    assert_served(node)
    assert all(opened.attempt == 0 for opened in node.proxy.opened.values())


def test_a_decode_instance_drains_by_finishing():
    node = ready(make_node())
    node.proxy.ask("r", max_tokens=60)
    until(node, lambda: len(node.proxy.got["r"]) > 2)
    life = node.lives["d"]
    life.runtime.drain()
    until(node, lambda: life.runtime.is_drained)
    assert_served(node)
