"""What an instance counts of itself, and publishes now and then."""

import pytest

from aegaeon.engine.base import EngineUsage
from aegaeon.errors import RegionError
from aegaeon.figures import Done, InstanceFigures, ProxyFigures, decode_figures, encode_figures
from aegaeon.instance.counts import INTERVAL_S, OUTAGE_S, Counts
from aegaeon.measures import PhaseTotal
from aegaeon.types import (
    InstanceStatus,
    Load,
    Loaded,
    LoadFailed,
    Prefill,
    Stepped,
    Switched,
)
from tests.support.bench import Bench

USAGE = EngineUsage(
    *(10, 100, 20, 200),
    moved={"disk": PhaseTotal(1, 10, 0.5)},
    cached=("a",),
    evicted={"a": {"room": 2}},
    stage_bytes=30,
    grammar_host_bytes=40,
)
STATUS = InstanceStatus(compute_s=1.0, expected_s=2.0, stall_s=3.0)


class Published:
    """Keeps what is published; refuses as often as it is told to."""

    def __init__(self):
        self.records, self.refusals = [], 0

    def __call__(self, record):
        if self.refusals:
            self.refusals -= 1
            raise RegionError("no room")
        self.records.append(record)

    @property
    def last(self):
        return decode_figures(self.records[-1])


def test_switches_loads_and_evictions_are_counted_by_model_and_reason():
    counts = Counts()
    counts.switched(Switched("a", 0.5), "newcomer")
    counts.switched(Switched("a", 0.25), "newcomer")
    counts.switched(Switched("a", 1.0), "makes_way")
    load = Load("a", evict=("b",))
    counts.load_began(load, "least_slack_absent")
    counts.load_ended(load, Loaded("a", 1, 2.0, evicted=("b", "c")), "load", "least_slack_absent")
    counts.load_ended(load, LoadFailed("a", "x", "y"), "load", "least_slack_absent")
    counts.preempted("a")
    models = counts.figures.models
    assert models["a"].moves == {
        "switch": {"newcomer": Done(2, 0.75), "makes_way": Done(1, 1.0)},
        "load": {"least_slack_absent": Done(1, 2.0)},
    }
    assert (models["a"].failed_loads, models["a"].preemptions) == (1, 1)
    assert models["b"].evictions == {"device": {"least_slack_absent": 1}}
    assert models["c"].evictions == {"device": {"displaced": 1}}


def test_a_successor_goes_on_where_the_last_one_ended():
    published = Published()
    for start in (1, 2, 3):
        counts = Counts(published, published.records[-1] if published.records else None)
        counts.switched(Switched("a", 0.5), "newcomer")
        for now in (0.0, INTERVAL_S):  # what engine and steps have counted is theirs alone, once
            counts.publish(USAGE, STATUS, now)
        found = published.last
        assert found.starts == start and found.beats == 2 * start
        assert found.models["a"].moves["switch"]["newcomer"] == Done(start, 0.5 * start)
        assert found.models["a"].evictions["host"] == {"room": 2 * start}
        assert found.moved["disk"] == PhaseTotal(start, 10 * start, 0.5 * start)
        assert (found.compute_s, found.expected_s, found.stall_s) == (start, 2 * start, 3 * start)
        assert (found.weight_bytes, found.kv_budget_bytes, found.cached) == (10, 200, ("a",))
        assert (found.stage_bytes, found.grammar_host_bytes) == (30, 40)


@pytest.mark.parametrize("before", [b"\xc1", b"", b"\x80"])
def test_what_cannot_be_read_is_begun_anew(before):
    assert Counts(before=before).figures.starts == 1


def test_publication_is_rare_and_rarer_while_there_is_no_room():
    published = Published()
    counts = Counts(published)
    published.refusals = 1
    times = [tenth / 10 for tenth in range(int(10 * (OUTAGE_S + 3 * INTERVAL_S)) + 1)]
    for now in times:
        counts.publish(USAGE, STATUS, now)
    assert len(published.records) == 4


def test_a_runtime_counts_what_its_scheduler_decides():
    published = Published()
    bench = Bench(budget_bytes=150)
    bench.runtime._parts.counts._publish = published
    for model in "ab":
        bench.submit(model, model, max_tokens=3)
        bench.work()
    bench.now += 2 * INTERVAL_S
    bench.turn()
    found = published.last
    for model in "ab":
        moves = found.models[model].moves
        assert {phase: sum(d.count for d in moves[phase].values()) for phase in moves} == {
            "load": 1,
            "switch": 1,
        }
        assert all(reason for reasons in moves.values() for reason in reasons)
    assert sum(found.models["a"].evictions["device"].values()) == 1
    assert found.weight_bytes == 100


def test_pre_empted_requests_are_counted_of_their_own_models():
    bench = Bench()
    bench.submit("r", max_tokens=9)
    bench.until(Prefill)
    lost = Stepped("a", (), 0.1, preempted=("r", "unknown"), shortage="no blocks")
    bench.compute.run = lambda _: lost
    bench.compute.finish()
    bench.turn()
    assert bench.runtime._parts.counts.figures.models["a"].preemptions == 1


def test_figures_of_another_kind_are_not_continued():
    assert Counts(before=encode_figures(InstanceFigures(starts=4))).figures.starts == 5
    assert Counts(before=encode_figures(ProxyFigures(starts=4))).figures.starts == 1


def test_ends_by_the_watchdog_are_counted_beside_other_ones():
    before = encode_figures(InstanceFigures(starts=4, hung=1))
    assert Counts(before=before).figures.hung == 1
    again = Counts(before=before, was_hung=True).figures
    assert (again.starts, again.hung) == (5, 2)
