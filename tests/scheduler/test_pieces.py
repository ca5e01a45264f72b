"""How prompts are cut, and what the ledger knows of those that are half prefilled."""

from hypothesis import given
from hypothesis import strategies as st

from aegaeon.metrics import Target, times_between_tokens_s
from aegaeon.scheduler.cost import Costs, ModelCost
from aegaeon.scheduler.groups import Entry
from aegaeon.scheduler.pieces import TOKENS, Bounds, cut
from aegaeon.scheduler.policies import POLICIES, Fleet
from aegaeon.scheduler.residency import Residency
from aegaeon.sim.cluster import simulate
from aegaeon.sim.fleets import make_fleet
from aegaeon.sim.workloads import Arrival
from aegaeon.types import Begun, Decode, Loaded, NewToken, Prefill, Stepped, Switch, Switched
from tests.support.specs import make_request

COST = ModelCost(1.0, 5e-6, 4096, (1e-3, 1e-7, 2e-3), (0.0, 0.0, 0.01))
COSTS = Costs(16.0, 80.0, {"a": COST}, ("a",), switch_s=1e-4)


@given(
    st.lists(st.tuples(st.integers(1, 3000), st.floats(0, 0.99)), min_size=1, max_size=4),
    st.floats(0.0, 0.2),
    st.floats(-0.1, 2.0),
)
def test_a_piece_is_no_longer_than_it_may_be_and_gets_all_prompts_on(sizes, least_s, most_s):
    entries = [Entry(str(n), 0.0, t, known=int(t * k)) for n, (t, k) in enumerate(sizes)]
    total = sum(entry.tokens - entry.known for entry in entries)
    piece = cut(entries, COST, Bounds(least_s, most_s))
    assert piece.requests == tuple(str(n) for n in range(len(piece.requests)))
    if piece.max_tokens is None:
        assert len(piece.requests) == len(entries)
        return
    assert piece.max_tokens % TOKENS == 0 and 0 < piece.max_tokens < total
    before = sum(entry.tokens - entry.known for entry in entries[: len(piece.requests) - 1])
    assert before < piece.max_tokens  # the last one gets some
    more_s = COST.prefill_s(2 * TOKENS, 2 * TOKENS * 6000) - COST.prefill[2]
    assert piece.prefill_s <= max(most_s, least_s, COST.prefill_s(TOKENS, TOKENS * 6000)) + more_s


def begun_scheduler():
    """A scheduler with one request that runs, and one of which a piece has been prefilled."""
    scheduler = POLICIES["slack"].scheduler(
        Residency({"a": 1}, 1), COSTS, Fleet(target=Target(10.0, 0.1)), "colocated"
    )
    scheduler.submit(make_request("r", "a", prompt_token_ids=(1,) * 8, max_tokens=99), 0.0)
    assert scheduler.next_load(0.0).model == "a"
    scheduler.complete(Loaded("a", 1, 0.1), 0.1)
    assert scheduler.next_action(0.1) == Switch("a")
    scheduler.complete(Switched("a", 0.0), 0.1)
    assert scheduler.next_action(0.1) == Prefill("a", ("r",))
    scheduler.complete(Stepped("a", (NewToken("r", 1),), 0.01), 0.11)
    scheduler.submit(make_request("s", "a", prompt_token_ids=(1,) * 800, max_tokens=9), 0.11)
    action = scheduler.next_action(0.11)
    assert action.requests == ("s",) and action.max_tokens < 100
    scheduler.complete(Stepped("a", (), 0.02, begun=(Begun("s", action.max_tokens, 0),)), 0.13)
    return scheduler, action.max_tokens


def test_those_who_run_get_a_step_between_two_pieces():
    scheduler, done = begun_scheduler()
    assert scheduler.snapshot().to_prefill == {"a": 800 - done}
    assert scheduler.has_begun("s")
    action = scheduler.next_action(0.13)
    assert isinstance(action, Decode) and action.requests == ("r",) and action.stretch.steps == 1
    scheduler.complete(Stepped("a", (NewToken("r", 1),), 0.01), 0.14)
    action = scheduler.next_action(0.14)
    assert isinstance(action, Prefill) and action.requests == ("s",) and action.max_tokens


def test_half_a_prompt_is_cancelled_or_lost_like_a_whole_one():
    scheduler, _ = begun_scheduler()
    scheduler.cancel("s", 0.13)
    assert scheduler.snapshot().to_prefill == {"a": 0} and not scheduler.has_begun("s")
    scheduler, done = begun_scheduler()
    scheduler.expect("s", 0, 0.13)  # an old guess
    assert scheduler.snapshot().to_prefill == {"a": 800 - done}
    assert isinstance(scheduler.next_action(0.13), Decode)
    lost = Stepped("a", (NewToken("r", 1),), 0.01, preempted=("s",), shortage="full")
    scheduler.complete(lost, 0.14)
    assert scheduler.snapshot().to_prefill == {"a": 800} and not scheduler.has_begun("s")
    assert scheduler.snapshot().waiting == {"a": 1}


def test_a_stream_hardly_notices_a_long_prompt_of_its_model():
    load = (Arrival(0.0, "a", 8, 400), Arrival(1.0, "a", 2000, 5))
    fleet = make_fleet("slack", 1, Target(10.0, 0.1))
    result = simulate(load, {"a": COST}, COSTS, POLICIES["slack"], fleet)
    stream, prompt = sorted(result.served, key=lambda one: one.arrival_s)
    assert max(times_between_tokens_s(stream.token_times_s)) < 0.06
    ttft_s = next(iter(prompt.token_times_s)) - 1.0
    assert ttft_s < 1.7 * COST.prefill_s(2000)
