"""A prompt goes where its beginning is known, if its first token comes sooner there."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegaeon.measures import Speed
from aegaeon.scheduler.dispatch import LEAST_GAIN_S, MOST_AHEAD, LiveDispatcher, Prompt
from aegaeon.scheduler.places import HomeDispatcher
from aegaeon.scheduler.policies import POLICIES
from tests.support.specs import make_instance

SPEEDS = {"a": Speed(token_s=0.004, load_s=0.5)}
PROMPT = Prompt(544, {"i1": 480})  # known: 1.92 s of prefilling


def row(name, **status):
    return make_instance(name, ("a",), **{"speeds": SPEEDS, **status})


def choice(*rows, prompt=PROMPT, unseen=None, policy=HomeDispatcher):
    return LiveDispatcher(policy()).dispatch(rows, "a", unseen or {}, prompt)


def busier(**status):
    """Where it is known; the policy would choose the other one."""
    return row("i1", **{"load": 0.9, "resident": ("a",), **status})


def test_it_goes_where_its_beginning_is_known():
    assert choice(row("i0"), busier(), prompt=Prompt()) == ("i0", "least_load")
    assert choice(row("i0"), busier()) == ("i1", "prefix")
    assert choice(row("i0", resident=("a",)), busier()) == ("i1", "prefix")


def test_the_policys_own_choice_is_not_a_matter_of_prefixes():
    assert choice(row("i0", load=2.0), busier()) == ("i1", "resident")
    assert choice(busier()) == ("i1", "only_one")


def test_a_line_that_takes_longer_than_the_prefill_saves_is_not_worth_it():
    idle = row("i0", resident=("a",))
    assert choice(idle, busier(ahead_s=1.7)).instance == "i1"
    assert choice(idle, busier(ahead_s=2.0)).instance == "i0"
    assert choice(row("i0", resident=("a",), ahead_s=9.0), busier(ahead_s=8.0)).instance == "i1"


def test_what_was_sent_since_is_in_the_line():
    idle = row("i0", resident=("a",))
    rest_s = (544 - 480) * 0.004
    before = int((480 * 0.004 - LEAST_GAIN_S) / rest_s)
    assert choice(idle, busier(), unseen={"i1": {"b": before}}).instance == "i1"
    assert choice(idle, busier(), unseen={"i1": {"b": before + 1}}).instance == "i0"


def test_weights_that_have_to_come_count():
    here = row("i0", resident=("a",))
    slow = {"a": Speed(0.004, load_s=1.8)}
    assert choice(here, busier(resident=())).instance == "i1"
    assert choice(here, busier(resident=(), speeds={"a": Speed(0.004, 2.1)})).instance == "i0"
    assert choice(row("i0", speeds=slow), busier(resident=(), speeds=slow)).instance == "i1"


def test_what_saves_nobody_would_notice_moves_nothing():
    fast = {"a": Speed(token_s=LEAST_GAIN_S / 500, load_s=0.0)}
    assert choice(row("i0", speeds=fast), busier(speeds=fast)).instance == "i0"


def test_nobody_moves_for_times_that_nobody_knows():
    assert choice(row("i0", speeds={}), busier(speeds={})).instance == "i0"


def test_a_place_without_times_of_its_own_counts_as_the_others():
    assert choice(row("i0", speeds={}), busier()).instance == "i1"
    assert choice(row("i0"), busier(speeds={})).instance == "i1"


def test_the_one_that_knows_most_is_not_chosen_where_another_is_sooner():
    prompt = Prompt(544, {"i1": 480, "i2": 400})
    rows = (row("i0"), busier(ahead_s=1.0), row("i2", load=0.8, resident=("a",)))
    assert choice(*rows, prompt=prompt).instance == "i2"
    assert choice(*rows[:2], row("i2", ahead_s=1.0, load=0.8), prompt=prompt).instance == "i1"


def test_what_all_prompts_begin_with_sticks_to_nobody():
    """However much it saves: in the end all know it."""
    slow = {"a": Speed(token_s=1.0, load_s=0.0)}
    known, counts = {"i1": 480}, {"i0": 0, "i1": 0, "i2": 0}
    dispatcher = LiveDispatcher(HomeDispatcher())
    for _ in range(6 * MOST_AHEAD):
        rows = [
            row(name, speeds=slow, load=0.06 * count, running={"a": count} if count else {})
            for name, count in counts.items()
        ]
        chosen = dispatcher.dispatch(rows, "a", {}, Prompt(500, dict(known))).instance
        counts[chosen] += 1
        known[chosen] = 480
    assert min(counts.values()) >= MOST_AHEAD
    assert max(counts.values()) <= min(counts.values()) + 2 * MOST_AHEAD


def test_instances_that_do_not_prefill_or_do_not_serve_are_not_chosen():
    assert choice(row("i0"), make_instance("i1", ("a",), "decode", speeds=SPEEDS)).instance == "i0"
    assert choice(row("i0"), busier(state="draining")).instance == "i0"
    assert choice(row("i0"), make_instance("i1", ("b",), speeds=SPEEDS)).instance == "i0"


states = st.lists(
    st.tuples(
        st.floats(0, 2),  # load
        st.integers(0, 40),  # running
        st.floats(0, 10),  # ahead
        st.booleans(),  # resident
        st.integers(0, 34),  # blocks known
        st.booleans(),  # speed known
    ),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("policy", sorted(POLICIES))
@given(states, st.floats(0, 0.02), st.floats(0, 5))
def test_only_who_knows_more_and_is_not_overloaded_takes_what_the_policy_gave_another(
    policy, states, token_s, load_s
):
    rows = [
        row(
            f"i{n}", load=load, running={"a": running} if running else {}, ahead_s=ahead_s,
            resident=("a",) if is_resident else (),
            speeds={"a": Speed(token_s, load_s)} if has_speed else {},
        )
        for n, (load, running, ahead_s, is_resident, _, has_speed) in enumerate(states)
    ]  # fmt: skip
    known = {f"i{n}": state[4] * 16 for n, state in enumerate(states)}
    make = POLICIES[policy].dispatcher
    policys = choice(*rows, prompt=Prompt(600), policy=make).instance
    got = choice(*rows, prompt=Prompt(600, known), policy=make)
    if got.reason != "prefix":
        assert got.instance == policys
        return
    by_id = {one.record.id: one.status for one in rows}
    assert known[got.instance] > known[policys]
    ahead = sum(by_id[got.instance].running.values()) - sum(by_id[policys].running.values())
    assert ahead < MOST_AHEAD

    def first_s(name):
        away_s = 0.0 if by_id[name].resident else load_s
        return by_id[name].ahead_s + away_s + (600 - known[name]) * token_s

    assert first_s(got.instance) < first_s(policys)
