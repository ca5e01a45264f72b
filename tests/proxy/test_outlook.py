"""When to come again: what the proxy makes of its requests, the instances' rows and the costs."""

import msgspec
import pytest

from aegaeon.config import check_settings
from aegaeon.measures import PhaseTotal
from aegaeon.proxy.generation import OpenRequest
from aegaeon.proxy.outbox import Target
from aegaeon.proxy.outlook import Outlook
from aegaeon.scheduler.cost import Costs, ModelCost
from tests.proxy.test_gateway import generation
from tests.support.specs import make_instance, make_spec

# A prefill takes 2 s, whatever its size, a step 0.05 s, a load 4 s: 8 GB at 2 GB/s.
COST = ModelCost(8.0, 1e-3, 4096, (0.0, 0.0, 2.0), (0.0, 0.0, 0.05))
SPECS = tuple(make_spec(model, weight_bytes=8_000_000_000) for model in "ab")


class Bench:
    """An outlook over requests and rows that tests write, at a time that they tell."""

    def __init__(self, tmp_path, **settings):
        costs = Costs(2.0, 80.0, dict.fromkeys("ab", COST), ("a",))
        path = tmp_path / "costs.json"
        path.write_bytes(msgspec.json.encode(costs))
        self.now, self.opened = 1000.0, []
        self.rows = (make_instance("i", ("a", "b"), resident=("a", "b")),)
        chosen = check_settings(
            {"colocated_count": 1, "costs_file": str(path), "slo_tbt_s": 1e3, **settings}
        )
        self.outlook = Outlook(
            chosen, lambda: self.opened, lambda: self.rows, clock=lambda: self.now
        )
        self.outlook.serve(SPECS)

    def open(self, model="a", made=0, at="i", **changes):
        one = OpenRequest("r", generation(model=model, **changes), self.now, self.now + 600)
        one.target = None if at is None else Target(at, 1)
        one._tokens = [1] * made
        self.opened.append(one)

    def wait_s(self, room="waiting", key=None):
        return self.outlook.wait_s(room, key)

    def later(self, seconds):
        self.now += seconds


def test_the_next_place_comes_free_when_the_next_one_begins(tmp_path):
    bench = Bench(tmp_path)
    for _ in range(3):
        bench.open()
    assert [bench.wait_s() for _ in range(3)] == [2.0, 5.0, 7.0]  # 2 s, 4 s and a bit, 6 and two
    bench.later(2.75)
    bench.opened.pop()
    bench.opened[0]._tokens = [1]
    # One waits, for 2 s; two were told of what comes free earlier.
    assert bench.wait_s() == 7.0


def test_a_load_comes_to_it_at_the_rate_that_was_measured(tmp_path):
    bench = Bench(tmp_path)
    bench.open("b")
    bench.rows = (make_instance("i", ("a", "b"), resident=("a",)),)
    assert bench.wait_s() == 6.0
    bench.later(60.0)
    moved = {"disk": PhaseTotal(1, 8_000_000_000, 16.0)}
    bench.rows = (make_instance("i", ("a", "b"), resident=("a",), moved=moved),)
    assert bench.wait_s() == 18.0


def test_so_does_what_steps_really_take(tmp_path):
    bench = Bench(tmp_path)
    bench.open()
    status = {"resident": ("a", "b"), "compute_s": 30.0, "expected_s": 10.0}
    bench.rows = (make_instance("i", ("a", "b"), **status),)
    assert bench.wait_s() == 6.0


def test_where_no_more_may_run_answers_end_as_they_did_lately(tmp_path):
    bench = Bench(tmp_path, max_batch=1, max_running=1)
    bench.open(made=1, max_tokens=1001)
    bench.open()
    assert bench.wait_s() == 52.0  # 1000 steps, then the prefill
    bench.outlook.note_end(generation(model="a", max_tokens=1000), 100)
    bench.later(200.0)
    assert bench.wait_s() == 7.0
    assert bench.wait_s("bytes") == 5.0  # its prompt is let go a little earlier


def test_of_a_key_only_its_own_places_come_free(tmp_path):
    bench = Bench(tmp_path)
    for key in ("greedy", "modest", "greedy"):
        bench.open(key=key)
    assert bench.wait_s(key="modest") == 5.0
    assert bench.wait_s(key="greedy") == 2.0


def test_those_on_their_way_count_and_instances_work_side_by_side(tmp_path):
    bench = Bench(tmp_path)
    bench.rows = tuple(make_instance(name, ("a", "b"), resident=("a",)) for name in "ij")
    bench.open(at="i")
    bench.open(at=None)
    assert [bench.wait_s() for _ in range(2)] == [2.0, 2.0]


def test_requests_of_other_proxies_are_in_the_way_and_give_no_place(tmp_path):
    bench = Bench(tmp_path)
    for _ in range(2):
        bench.open()
    bench.rows = (make_instance("i", ("a", "b"), resident=("a",), waiting={"a": 4}),)
    waits = [bench.wait_s() for _ in range(2)]
    other = Bench(tmp_path)
    for _ in range(4):
        other.open()
    alone = [other.wait_s() for _ in range(4)]
    assert waits == [alone[0], alone[2]]


@pytest.mark.parametrize("rows", [(), (make_instance("i", ("a",), state="starting"),)])
def test_without_an_instance_they_come_one_a_second(tmp_path, rows):
    bench = Bench(tmp_path)
    bench.rows = rows
    bench.open(at=None)
    assert [bench.wait_s() for _ in range(3)] == [1.0, 2.0, 3.0]


def test_a_forecast_is_made_now_and_then_and_what_was_told_is_forgotten(tmp_path):
    bench = Bench(tmp_path)
    looks = []
    look = bench.outlook._look
    bench.outlook._look = lambda now: looks.append(now) or look(now)
    bench.open()
    for _ in range(100):
        bench.wait_s(key="a-key")
    assert len(looks) == 1 and len(bench.outlook._lines) == 1
    bench.later(1e5)
    bench.wait_s()
    assert len(looks) == 2 and list(bench.outlook._lines) == [("waiting", "")]


def test_costs_that_cannot_be_read_are_guessed(tmp_path, caplog):
    bench = Bench(tmp_path)
    (tmp_path / "costs.json").write_text("{}")
    other = Bench.__new__(Bench)
    other.now, other.opened, other.rows = bench.now, [], bench.rows
    other.outlook = Outlook(
        check_settings({"costs_file": str(tmp_path / "costs.json")}),
        lambda: other.opened,
        lambda: other.rows,
        clock=lambda: other.now,
    )
    other.outlook.serve(SPECS)
    other.open()
    assert other.wait_s() >= 1.0 and "costs are guessed" in caplog.text


def test_room_to_wait_for_loads_comes_where_such_a_model_begins(tmp_path):
    bench = Bench(tmp_path)
    bench.rows = (make_instance("i", ("a", "b"), resident=("a",)),)
    bench.open("a")
    bench.open("b")
    assert bench.outlook.resident() == {"a"}
    assert bench.wait_s("waiting") == 2.0
    assert bench.wait_s("loading") == 9.0  # the first one's 2 s, a load of 4 s, 2 s beside it


def test_room_for_all_that_is_open_comes_where_answers_end(tmp_path):
    bench = Bench(tmp_path)
    bench.open(made=1, max_tokens=101)
    assert bench.wait_s("open") == bench.wait_s("bytes") == 5.0
