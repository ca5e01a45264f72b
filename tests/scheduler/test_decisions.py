"""The ring of decisions."""

from aegaeon.scheduler.decisions import GOES_ON, Decisions
from aegaeon.types import Decode, Handoff, Idle, Load, Prefill, Switch


def test_the_same_again_and_again_is_one_entry():
    ring = Decisions()
    for step in range(5):
        ring.note(step, Decode("a", ("r", "s")), "turn_goes_on")
    ring.note(5.0, Decode("a", ("r",)), "turn_goes_on")
    first, second = ring.recent()
    assert (first.at_s, first.until_s, first.times, first.action) == (0, 4, 5, "decode")
    assert second.requests == ("r",) and second.reason == "turn_goes_on"


def test_a_request_finds_its_own():
    ring = Decisions()
    ring.note(0.0, Load("a", ("b",), offload=("x",)), "least_slack_absent")
    ring.note(1.0, Switch("a"), "least_slack")
    ring.note(2.0, Prefill("a", ("r",)), "least_slack")
    ring.note(3.0, Handoff("r"), "prefilled")
    ring.note(4.0, Idle(), "no_requests")
    assert [d.action for d in ring.recent("r")] == ["prefill", "handoff"]
    assert [d.evicted for d in ring.recent("x")] == [("b",)]
    assert [d.model for d in ring.recent()] == ["a", "a", "a", None, None]


def test_the_oldest_are_forgotten():
    ring = Decisions(most=3)
    for number in range(9):
        ring.note(float(number), Switch(f"m{number}"), "least_slack")
    assert [d.model for d in ring.recent()] == ["m6", "m7", "m8"]


def test_the_last_ones_are_told_with_what_befell_the_weights():
    ring = Decisions()
    ring.note(0.0, Load("a"), "least_slack_absent")
    ring.note(1.0, Switch("b"), "least_slack")
    ring.note(2.0, Prefill("a", ("x.0", "r")), "least_slack")
    ring.note(3.0, Load("b", ("a",)), "makes_way")
    ring.note(4.0, Decode("a", ("xy",)), "least_slack")
    assert [d.at_s for d in ring.recent("x", "a")] == [0.0, 2.0, 3.0]
    assert [d.at_s for d in ring.recent("x", "a", limit=2)] == [2.0, 3.0]
    assert [d.at_s for d in ring.recent("x")] == [2.0]
    assert [d.at_s for d in ring.recent(limit=1)] == [4.0]


def test_a_decode_that_goes_on_is_one_entry_with_its_first_reason():
    ring = Decisions()
    ring.note(0.0, Decode("a", ("r",)), "least_slack")
    ring.note(1.0, Decode("a", ("r",)), GOES_ON)
    (only,) = ring.recent()
    assert (only.reason, only.times, only.until_s) == ("least_slack", 2, 1.0)


def test_what_comes_round_by_turns_is_one_entry_a_second():
    ring = Decisions()
    for number in range(100):  # two seconds
        name = "ab"[number % 2]
        ring.note(number / 50, Switch(name), "takes_turns")
        ring.note(number / 50 + 0.01, Decode(name, (f"r{name}",)), "takes_turns")
    told = ring.recent()
    assert [(d.action, d.model) for d in told[:4]] == [
        *(("switch", "a"), ("decode", "a")),
        *(("switch", "b"), ("decode", "b")),
    ]
    assert len(told) == 8 and sum(d.times for d in told) == 200
    assert told[1].times == 25 and 0.9 < told[1].until_s < 1.0 < told[5].at_s < 1.1
    assert [d.model for d in ring.recent("ra", "a")] == ["a"] * 4


def test_what_goes_on_of_a_turn_is_its_entry_and_another_batch_is_not():
    ring = Decisions()
    ring.note(0.0, Decode("a", ("r",)), "takes_turns")
    ring.note(0.1, Decode("b", ("s",)), "takes_turns")
    ring.note(0.2, Decode("a", ("r",)), "takes_turns")
    ring.note(0.3, Decode("a", ("r",)), GOES_ON)
    ring.note(0.4, Decode("b", ("s", "t")), "takes_turns")
    ring.note(0.5, Decode("a", ("r",)), "least_slack")
    ring.note(0.6, Decode("b", ("s", "t")), "takes_turns")
    assert [(d.model, d.times) for d in ring.recent()] == [
        *(("a", 3), ("b", 1), ("b", 1)),
        *(("a", 1), ("b", 1)),
    ]
