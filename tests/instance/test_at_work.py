"""What an instance does is known after its death; suspects are computed alone, and told first."""

import os
import signal
import struct
import subprocess
import sys
import textwrap

from hypothesis import given
from hypothesis import strategies as st

from aegaeon.deaths import NO_WORK, PROGRESS_TOKENS, Confirm, Work
from aegaeon.instance.apart import Apart, Suspects
from aegaeon.instance.at_work import SLOT_BYTES, AtWork, last_work, memory
from aegaeon.sampling import PromptScores
from aegaeon.types import (
    Cancel,
    Decode,
    LoadFailed,
    NewToken,
    Prefill,
    RequestFailed,
    Stepped,
    Switch,
    Switched,
    WeightsLost,
)
from tests.support.bench import Bench
from tests.support.specs import make_request

# Notes something else all the time, until it is killed.
BUSY = """
    import sys
    from aegaeon.instance.at_work import AtWork
    at_work = AtWork(int(sys.argv[1]))
    number = 0
    while True:
        number += 1
        at_work.compute("m", tuple(f"r{number}" for _ in range(50)))
        if number == 100:
            print("busy", flush=True)
"""


def test_what_was_noted_last_is_read_by_whoever_has_the_memory():
    descriptor = memory()
    try:
        assert last_work(descriptor) == NO_WORK
        at_work = AtWork(descriptor)
        at_work.compute("m", ("r", "s"))
        at_work.load("n")
        at_work.take("t")
        assert last_work(descriptor) == Work("m", ("r", "s"), "n", "t") == at_work.work
        at_work.take(None)
        at_work.compute("m", ())
        at_work.load(None)
        assert last_work(descriptor) == Work("m")
        at_work.rest()
        assert last_work(descriptor) == NO_WORK
        at_work.compute("m", ("r" * SLOT_BYTES,))
        assert last_work(descriptor) is None
    finally:
        os.close(descriptor)


@given(st.integers(0, 1), st.integers(0, 200), st.integers(0, 255))
def test_a_note_that_is_not_whole_leaves_the_one_before(turn, at, value):
    descriptor = memory()
    try:
        at_work = AtWork(descriptor)
        for number in range(3 + turn):
            at_work.compute("m", (f"r{number}",))
        last, before = Work("m", (f"r{2 + turn}",)), Work("m", (f"r{1 + turn}",))
        os.pwrite(descriptor, bytes([value]), at_work._number % 2 * SLOT_BYTES + at)
        assert last_work(descriptor) in {last, before}
        # Cut off behind any byte of it.
        header = struct.pack("<QII", at_work._number + 1, 100, 7)
        os.pwrite(descriptor, header, at_work._number % 2 * SLOT_BYTES)
        assert last_work(descriptor) == before
    finally:
        os.close(descriptor)


def test_who_is_killed_while_it_notes_leaves_a_whole_note():
    descriptor = memory()
    try:
        command = [sys.executable, "-c", textwrap.dedent(BUSY), str(descriptor)]
        with subprocess.Popen(command, pass_fds=[descriptor], stdout=subprocess.PIPE) as busy:
            assert busy.stdout.readline() == b"busy\n"
            busy.send_signal(signal.SIGKILL)
        work = last_work(descriptor)
        assert work.model == "m" and len(work.requests) == 50 and len(set(work.requests)) == 1
    finally:
        os.close(descriptor)


def step(*requests, preempted=(), took_s=1.0):
    tokens = tuple(NewToken(request, 7) for request in requests)
    return Stepped("m", tokens, took_s, preempted=preempted, shortage="full" if preempted else "")


def test_an_action_without_suspects_is_one_part_as_it_is():
    for action in (Decode("m", ("a", "b")), Prefill("m", ("a",)), Switch("m")):
        apart = Apart(action)
        assert not apart.is_next_alone and apart.next() is action
    outcome = step("a", "b")
    assert Apart(Decode("m", ("a", "b"))).end(outcome) is outcome
    switched = Switched("m", 1.0)
    assert Apart(Switch("m")).end(switched) is switched


def test_suspects_come_alone_behind_the_others_and_the_outcome_is_that_of_all():
    apart = Apart(Prefill("m", ("a", "b", "c", "d")), ("b", "d"))
    assert apart.next() == Prefill("m", ("a", "c")) and apart.is_next_alone
    assert apart.end(step("a", "c")) is None
    assert apart.next() == Prefill("m", ("b",))
    assert apart.end(step("b")) is None
    assert apart.next() == Prefill("m", ("d",))
    whole = apart.end(step("d", took_s=0.5))
    assert [token.request_id for token in whole.tokens] == ["a", "c", "b", "d"]
    assert whole.took_s == 2.5 and whole.is_apart

    scoring = Apart(Prefill("m", ("a", "b")), ("b",))
    scores = [PromptScores(one, 0, 1, ()) for one in "ab"]
    failures = [(one, "code", "why") for one in "ab"]
    for number in range(2):
        scoring.next()
        part = Stepped("m", (), 1.0, failed=(failures[number],), scores=(scores[number],))
        whole = scoring.end(part)
    assert whole.failed == tuple(failures) and whole.scores == tuple(scores)

    only = Apart(Decode("m", ("a", "b")), ("a", "b"))
    assert only.is_next_alone and only.next() == Decode("m", ("a",))


def test_who_loses_its_kv_in_a_part_is_in_no_later_one():
    apart = Apart(Decode("m", ("a", "b", "c")), ("b", "c"))
    apart.next()
    assert apart.end(step("a", preempted=("b",))) is None
    assert apart.next() == Decode("m", ("c",))
    whole = apart.end(step("c", preempted=("x",)))
    assert whole.preempted == ("b", "x") and whole.shortage == "full"
    last = Apart(Decode("m", ("a", "b")), ("b",))
    last.next()
    assert last.end(step("a", preempted=("b",))).preempted == ("b",)


def test_weights_that_go_between_the_parts_cost_no_token_that_was_made():
    apart = Apart(Decode("m", ("a", "b")), ("b",))
    apart.next()
    made = step("a")
    assert apart.end(made) is None
    apart.next()
    assert apart.end(WeightsLost("m")) is made
    first = Apart(Decode("m", ("a", "b")), ("b",))
    first.next()
    assert first.end(WeightsLost("m")) == WeightsLost("m")
    failed = Apart(Decode("m", ("a", "b")), ("b",))
    failed.next()
    failed.end(step("a"))
    assert isinstance(failed.end(LoadFailed("m", "code", "why")), LoadFailed)


def test_a_suspect_is_one_until_it_has_made_enough_tokens_or_ends():
    suspects = Suspects()
    suspects.enter(make_request("s", "m", is_suspect=True))
    suspects.enter(make_request("r", "m"))
    for _ in range(PROGRESS_TOKENS):
        assert suspects.among(Decode("m", ("r", "s"))) == ("s",)
        suspects.gained(step("r", "s"))
    assert suspects.among(Decode("m", ("r", "s"))) == ()
    suspects.enter(make_request("s", "m", is_suspect=True, attempt=1))
    suspects.enter(make_request("s", "m", attempt=2))
    assert suspects.among(Prefill("m", ("s",))) == ()
    suspects.enter(make_request("s", "m", is_suspect=True, attempt=3))
    suspects.gained(Stepped("m", (NewToken("s", 7, "stop"),), 1.0))
    assert not suspects._left


def tokens_of(bench):
    made = {}
    for reply in bench.replies():
        made.setdefault(reply.request_id, []).extend(reply.token_ids)
    return made


def test_suspects_make_the_tokens_that_they_make_in_company():
    told = []
    for is_suspect in (False, True):
        bench = Bench()
        for number in range(4):
            is_one = is_suspect and number in {1, 2}
            bench.submit(f"r{number}", max_tokens=2 * PROGRESS_TOKENS + number, is_suspect=is_one)
        computed = []
        run = bench.compute.run
        bench.compute.run = lambda action, run=run, log=computed: (log.append(action), run(action))[
            1
        ]
        bench.work(300)
        told.append(tokens_of(bench))
        steps = [action for action in computed if not isinstance(action, Switch)]
        for suspect in ("r1", "r2"):
            sizes = [len(action.requests) for action in steps if suspect in action.requests]
            if is_suspect:
                assert set(sizes[:PROGRESS_TOKENS]) == {1} and max(sizes[PROGRESS_TOKENS:]) > 1
            else:
                assert 1 not in sizes[:PROGRESS_TOKENS]
        assert bench.held_kv() == 0
    assert told[0] == told[1] and [len(told[0][f"r{n}"]) for n in range(4)] == [16, 17, 18, 19]


def test_what_others_made_has_left_before_a_suspect_is_computed():
    bench = Bench()
    at_work = bench.runtime._parts.at_work
    bench.submit("r", max_tokens=9)
    bench.submit("s", max_tokens=9, is_suspect=True)
    bench.until(Prefill)
    assert (bench.compute.action.requests, at_work.work.requests) == (("r",), ("r",))
    bench.compute.finish()
    bench.turn()
    assert (bench.compute.action.requests, at_work.work.requests) == (("s",), ("s",))
    assert set(tokens_of(bench)) == {"r"}
    bench.work(100)
    assert at_work.work == NO_WORK and bench.held_kv() == 0


def test_loads_and_what_is_taken_in_are_noted_too(monkeypatch):
    bench = Bench()
    at_work = bench.runtime._parts.at_work
    taken = []
    submit = bench.engine.submit
    monkeypatch.setattr(
        bench.engine, "submit", lambda r: (taken.append(at_work.work.taking), submit(r))
    )
    bench.submit("r")
    bench.turn()
    assert taken == ["r"] and at_work.work == Work(loading="a")
    bench.copy.finish()
    bench.turn()
    assert at_work.work == Work("a")  # it switches
    bench.work()
    assert at_work.work == NO_WORK


def test_a_cancelled_suspect_is_released_behind_the_parts():
    bench = Bench()
    bench.submit("r", max_tokens=1000)
    bench.submit("s", max_tokens=1000, is_suspect=True)
    bench.until(Prefill)
    bench.send(Cancel("s"))
    bench.turn()
    bench.compute.finish()
    bench.turn()
    assert bench.compute.action.requests == ("s",)
    bench.compute.finish()
    bench.turn()
    assert set(bench.engine._requests) == {"r"}


def test_a_proxy_is_told_which_of_its_attempts_are_not_here():
    bench = Bench()
    bench.submit("r", max_tokens=1000, attempt=2)
    bench.until(Decode)
    bench.replies()
    bench.send(Confirm((("r", 2), ("r", 1), ("r", 3), ("q", 0)), "proxy"))
    bench.turn()
    told = [one for one in bench.replies() if isinstance(one, RequestFailed)]
    assert [(one.request_id, one.attempt, one.code) for one in told] == [
        ("r", 3, "forgotten"),
        ("q", 0, "forgotten"),
    ]


def test_a_prefill_with_a_bound_takes_no_longer_for_its_suspects():
    """What is left of it is decided anew, the first of all first."""
    action = Prefill("m", ("a", "b", "c", "d"), 64)
    apart = Apart(action, ("b", "d"))
    assert not apart.is_next_alone and apart.next() == Prefill("m", ("a",), 64)
    outcome = Stepped("m", (NewToken("a", 1),), 0.1)
    assert apart.end(outcome) is outcome
    apart = Apart(Prefill("m", ("b", "c", "d"), 64), ("b", "d"))
    assert apart.is_next_alone and apart.next() == Prefill("m", ("b",), 64)
    assert apart.end(outcome) is outcome
    apart = Apart(Prefill("m", ("c", "d"), 64), ("b", "d"))
    assert apart.next() == Prefill("m", ("c",), 64)
