"""What an instance tells of its decisions, and that telling costs nothing."""

from aegaeon.explanations import Explain
from aegaeon.store.codec import decode_replies, encode
from tests.support.bench import Bench


def explain(bench, **asked):
    address = f"asker-{len(asked)}"
    fields = {"ticket": 7, "reply_to": address, "request": None, "model": None, "limit": 100}
    asker = bench.domain.create_mailbox(address)
    bench.send(Explain(**{**fields, **asked}))
    bench.turn()
    (record,) = asker.receive(0.0)
    (explained,) = decode_replies(record)
    return explained


def test_decisions_are_told_to_who_asks():
    bench = Bench()
    bench.submit("r")
    bench.submit("other", "b")
    bench.work()
    told = explain(bench, request="r", model="a")
    assert (told.ticket, told.instance) == (7, "i")
    assert [d.action for d in told.decisions] == ["load", "switch", "prefill", "decode"]
    assert all(d.reason for d in told.decisions) and told.decisions[-1].times == 3
    assert [d.action for d in explain(bench, limit=1).decisions] == ["idle"]


def test_looking_loads_and_starts_nothing():
    bench = Bench()
    bench.turn()
    assert {d.action for d in explain(bench, request="r", model="a").decisions} <= {"idle"}
    assert not bench.copy.is_busy and not bench.compute.is_busy


def test_an_answer_too_large_for_a_record_tells_the_last_decisions():
    bench = Bench(max_batch=64)
    names = [f"{n:03}" + "x" * 30_000 for n in range(40)]
    for name in names:
        bench.submit(name, max_tokens=3)
    bench.work()
    told = explain(bench)
    assert told.decisions and told.decisions[-1].action == "idle"
    assert len(encode(told)) <= 1 << 20
