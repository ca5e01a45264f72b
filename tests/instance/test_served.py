"""The models of an instance follow the catalogue, over scripted lanes and every policy."""

import logging

import msgspec
import pytest

from aegaeon.config import check_settings
from aegaeon.errors import BudgetTooSmall
from aegaeon.instance.served import SEE_LOG
from aegaeon.keeper import bounds_of
from aegaeon.scheduler.residency import Residency
from aegaeon.specs import REFUSALS_BYTES
from aegaeon.store.catalog import CatalogView
from aegaeon.types import Preload, RequestFailed
from tests.support.policies import LIVE
from tests.support.serving import ServingBench


@pytest.mark.parametrize("policy", LIVE)
def test_a_model_comes_answers_and_goes(policy):
    bench = ServingBench(policy)
    bench.submit("before", "b")
    bench.work()
    assert bench.ended("before").code == "model_not_found"
    for name in ("b", "c"):
        bench.add(name)
    row = bench.row()
    assert row.record.models == ("a", "b", "c")
    assert row.status.catalog == bench.catalog.read().version
    for turn in range(3):
        for name in ("a", "b", "c"):
            bench.submit(f"{name}{turn}", name, max_tokens=5, arrival_s=bench.now)
    bench.work(300)
    tokens = [reply for reply in bench.replies() if not isinstance(reply, RequestFailed)]
    assert len(tokens) == 45 and bench.held_kv() == 0
    bench.remove("b")
    row = bench.row()
    assert row.record.models == ("a", "c") and "b" not in row.status.resident
    bench.submit("after", "b")
    bench.submit("rest", "c", arrival_s=bench.now)
    bench.work()
    replies = {reply.request_id: reply for reply in bench.replies()}
    assert replies["after"].code == "model_not_found"
    assert replies["rest"].finish_reason == "length"
    # And again, with the room it had.
    bench.add("b")
    bench.row()
    bench.submit("again", "b", arrival_s=bench.now)
    bench.work(100)
    assert bench.ended("again").finish_reason == "length"


class Arriving(CatalogView):
    """The catalogue but for models whose files are still to come."""

    def __init__(self, store):
        self.store, self.missing = store, {"b"}

    def read(self):
        whole = self.store.read()
        models = tuple(spec for spec in whole.models if spec.id not in self.missing)
        return msgspec.structs.replace(whole, models=models)


def test_a_model_whose_files_come_later_is_served_from_then_on():
    views = []
    bench = ServingBench(view=lambda store: views.append(Arriving(store)) or views[0])
    bench.add("b")
    row = bench.row()
    assert row.record.models == ("a",)
    version = bench.catalog.read().version
    assert row.status.catalog == version  # nothing else is to be followed
    views[0].missing.clear()
    row = bench.row()
    assert (row.record.models, row.status.catalog) == (("a", "b"), version)
    bench.submit("now", "b")
    bench.work()
    assert bench.ended("now").finish_reason == "length"


@pytest.mark.parametrize("policy", LIVE)
def test_models_that_have_gone_leave_nothing_behind(policy):
    bench = ServingBench(policy)
    for turn in range(6):
        bench.add(f"m{turn}")
        bench.row()
        bench.submit(f"r{turn}", f"m{turn}", arrival_s=bench.now)
        bench.work(60)
        assert bench.ended(f"r{turn}").finish_reason == "length"
        bench.remove(f"m{turn}")
        assert bench.row().record.models == ("a",)
    assert set(bench.scheduler.snapshot().to_prefill) <= {"a"}
    assert bench.groups() <= {"a"} and bench.clocks() <= {"a"}
    for _ in range(40):  # whatever waits for times that have passed
        bench.now += 2.0
        bench.turn()
    bench.submit("last", "a", arrival_s=bench.now)
    bench.work(60)
    assert bench.ended("last").finish_reason == "length"


@pytest.mark.parametrize("policy", LIVE)
@pytest.mark.parametrize("stage", ["waiting", "loading", "computing"])
def test_one_with_requests_stays_until_they_have_ended(policy, stage):
    bench = ServingBench(policy)
    bench.add("b")
    bench.row()
    bench.submit("r", "b", max_tokens=6, arrival_s=bench.now)
    bench.turn()
    if stage == "loading":
        assert bench.copy.is_busy
    elif stage == "computing":
        for _ in range(8):
            if not bench.compute.is_busy:
                bench.copy.finish()
                bench.turn()
        assert bench.compute.is_busy
    bench.remove("b")
    assert bench.row().record.models == ("a", "b")
    bench.work(100)
    assert bench.ended("r").finish_reason == "length"
    bench.work(3)
    assert bench.row().record.models == ("a",)


def test_one_that_is_removed_while_it_computes_nothing_gives_up_the_device():
    bench = ServingBench()
    bench.add("b")
    bench.row()
    bench.submit("r", "b", arrival_s=bench.now)
    bench.work(60)
    assert bench.status().current == "b"
    bench.remove("b")
    assert bench.row().status.current is None
    bench.submit("s", "a", arrival_s=bench.now)
    bench.work(60)
    assert bench.ended("s").finish_reason == "length"


def test_what_does_not_fit_is_refused_and_known_no_more_when_it_is_taken_back():
    bench = ServingBench()
    bench.add("huge", weight_bytes=1000)
    status = bench.row().status
    assert "needs 0.00 GB for its weights" in status.refused["huge"]
    assert status.catalog == bench.catalog.read().version
    assert bench.row().record.models == ("a",)
    bench.submit("r", "huge")
    bench.work(5)
    assert bench.ended("r").code == "model_not_found"
    bench.remove("huge")
    assert bench.row().status.refused == {}
    for number in range(400):  # more reasons than there is room for: each is still named
        bench.add(f"huge-{number:04d}", weight_bytes=1000)
    refused = bench.row().status.refused
    assert len(refused) == 400 and refused["huge-0399"] == SEE_LOG
    assert sum(map(len, refused.values())) < REFUSALS_BYTES + 400 * len(SEE_LOG)
    for number in range(400):
        bench.remove(f"huge-{number:04d}")
    bench.add("huge", weight_bytes=200)
    assert bench.row().record.models == ("a", "huge")


def test_a_pin_is_loaded_without_a_request_and_makes_no_room():
    bench = ServingBench()
    bench.add("b", is_pinned=True)
    bench.work(5)
    assert bench.status().resident == ("b",)
    for name in ("c", "d", "e"):
        bench.add(name)
    bench.row()
    for turn in range(3):
        for name in ("a", "c", "d", "e"):
            bench.submit(f"{name}{turn}", name, arrival_s=bench.now)
            bench.work(40)
            assert "b" in bench.status().resident
    bench.add("b")
    bench.row()
    for name in ("a", "c", "d", "e"):
        bench.submit(f"{name}-last", name, arrival_s=bench.now)
        bench.work(40)
    assert "b" not in bench.status().resident


def test_a_model_that_is_served_already_is_loaded_when_pinned_or_asked_for():
    for ask in (
        lambda bench: bench.add("b", is_pinned=True),
        lambda bench: bench.send(Preload("b")),
    ):
        bench = ServingBench()
        bench.add("b")
        bench.row()
        bench.work(5)
        assert bench.status().resident == ()
        ask(bench)
        bench.send(Preload("zzz"))
        bench.row()
        bench.work(5)
        assert bench.status().resident == ("b",)


def test_a_pin_that_leaves_too_little_is_refused_and_the_model_stays():
    bench = ServingBench()
    bench.add("b", weight_bytes=200)
    bench.add("c", weight_bytes=200)
    bench.row()
    bench.add("b", weight_bytes=200, is_pinned=True)
    status = bench.row().status
    assert "pin fewer" in status.refused["b"]
    assert bench.row().record.models == ("a", "b", "c")
    bench.add("b", weight_bytes=200)
    assert bench.row().status.refused == {}
    bench.submit("r", "c", arrival_s=bench.now)
    bench.work(40)
    assert bench.ended("r").finish_reason == "length"


def test_a_target_of_its_own_makes_a_model_more_urgent():
    def first_s(**changes):
        bench = ServingBench(slo_ttft_s=10.0)
        for name in ("b", "c"):
            bench.add(name, **(changes if name == "c" else {}))
        bench.row()
        begun = {}
        for name in ("b", "c"):
            bench.submit(name, name, arrival_s=bench.now, max_tokens=2)
        for _ in range(60):
            bench.work(1)
            for reply in bench.replies():
                begun.setdefault(reply.request_id, bench.now)
        return begun

    plain, urgent = first_s(), first_s(slo_ttft_s=0.5)
    assert plain["b"] < plain["c"] and urgent["c"] < urgent["b"]


def test_residency_keeps_its_books_as_models_come_and_go():
    residency = Residency({"a": 100}, 300)
    residency.enter("b", 200)
    residency.pin("b")
    with pytest.raises(BudgetTooSmall):
        residency.enter("c", 150)
    residency.enter("c", 100)
    with pytest.raises(BudgetTooSmall, match="pin fewer"):
        residency.pin("a")
    residency.leave("c")
    assert not residency.serves("c") and residency.serves("b")


@pytest.mark.parametrize("policy", LIVE)
def test_a_priority_follows_the_catalogue_and_goes_with_its_model(policy):
    bench = ServingBench(policy)
    ranks = bench.runtime._parts.scheduler._ranks
    bench.add("b", priority="low")
    bench.add("a", priority="high")
    bench.row()
    assert ranks.are_used and (ranks.of("a"), ranks.of("b")) == (2, 0)
    bench.add("a")
    bench.remove("b")
    bench.row()
    assert not ranks.are_used


@pytest.mark.parametrize("policy", LIVE)
def test_limits_and_promises_follow_while_serving(policy, root_level):
    bench = ServingBench(policy)
    bench.submit("first", "a")
    changed = {"max_waiting": 1, "max_running": 7, "slo_ttft_s": 2.5, "log_level": "warning"}
    bounds = bounds_of(check_settings(changed))
    bench.catalog.change(lambda before: msgspec.structs.replace(before, bounds=bounds))
    bench.row()
    scheduler = bench.runtime._parts.scheduler
    assert scheduler._limits.max_running == 7
    assert scheduler._targets["a"].ttft_s == 2.5
    assert logging.getLogger().level == logging.WARNING
    for number in range(4):
        bench.submit(f"r{number}", "a")
    bench.turn()
    assert "raise --max-waiting" in bench.ended("r3").message
    bench.work(300)
    bench.add("b")
    bench.row()
    assert scheduler._targets["b"].ttft_s == 2.5
