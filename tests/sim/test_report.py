"""What a run comes to, in figures and in words."""

import io

import msgspec
import pytest
from rich.console import Console

from aegaeon.metrics import Served, Target, attainment
from aegaeon.sim.cluster import Simulated
from aegaeon.sim.device import Usage
from aegaeon.sim.report import SHOWN_MODELS, make_report, render

TARGET = Target(1.0, 0.1)
ON_TIME = Served("a", 0.0, [0.5, 0.6, 0.7], 3)
LATE = Served("a", 1.0, [4.0, 4.5], 2)
DROPPED = Served("b", 2.0, [2.5], 9, is_failed=True)
ONE_TOKEN = Served("b", 3.0, [3.25], 1)
USAGE = [
    Usage(compute_s=3.0, switch_s=0.5, stall_s=1.0, link_s=2.0, switches=2, loads=1),
    Usage(compute_s=1.0, link_s=1.0, switches=1, loads=2, kv_moved_gb=1.5),
]


def make(served=(ON_TIME, LATE, DROPPED, ONE_TOKEN)):
    return make_report(Simulated(list(served), USAGE, 5.0), "slack", TARGET)


def words_of(report):
    console = Console(file=io.StringIO(), width=100)
    for part in render(report):
        console.print(part, highlight=False)
    return console.file.getvalue()


def test_totals_are_those_of_all_requests_together():
    report = make()
    kept = attainment([ON_TIME, LATE, DROPPED, ONE_TOKEN], TARGET)
    assert report.attainment_time == pytest.approx(kept.time)
    assert report.attainment_token == pytest.approx(kept.token)
    assert report.attainment_request == pytest.approx(kept.request) == 0.5
    assert (report.models, report.requests, report.failed, report.tokens) == (2, 4, 1, 7)
    assert (report.switches, report.loads, report.kv_moved_gb) == (3, 3, 1.5)


def test_shares_are_of_all_devices_time():
    report = make()
    assert report.device_time_share == pytest.approx(0.4)
    assert report.switch_time_share == pytest.approx(0.05)
    assert report.stall_time_share == pytest.approx(0.1)
    assert report.link_time_share == pytest.approx(0.3)


def test_each_model_has_its_own_figures():
    first, second = make().per_model
    assert (first.model, first.requests, first.failed, first.tokens) == ("a", 2, 0, 5)
    assert first.attainment_request == 0.5
    assert first.ttft_p50_s == pytest.approx(1.75)
    assert (second.model, second.failed, second.attainment_request) == ("b", 1, 0.5)


def test_fairness_falls_when_one_model_gets_all():
    assert make().fairness == 1.0
    assert make([ON_TIME, DROPPED]).fairness == 0.5


def test_a_request_has_one_mean_time_between_tokens():
    tbt_s = make().tbt_s
    assert tbt_s.avg == pytest.approx((0.1 + 0.5) / 2)


def test_a_run_without_requests_kept_everything():
    report = make([])
    assert (report.attainment_request, report.fairness, report.requests) == (1.0, 1.0, 0)
    assert report.ttft_s.p50 is None and report.per_model == ()
    assert "TTFT p50 / p99" in words_of(report)


def test_it_survives_json():
    report = make()
    assert msgspec.json.decode(msgspec.json.encode(report), type=type(report)) == report


def test_people_see_totals_and_the_models_that_fared_worst():
    many = [Served(f"m{n:02d}", 0.0, [0.5], 1) for n in range(SHOWN_MODELS + 3)]
    text = words_of(make([*many, DROPPED]))
    assert "slack on 2 devices" in text
    assert "attainment_request" in text and "93.8 %" in text
    lines = text.splitlines()
    heading = next(n for n, line in enumerate(lines) if line.startswith("model"))
    assert lines[heading + 1].startswith("b ")
    assert "4 models that fared no worse are left out" in text
