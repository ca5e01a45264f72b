"""`aegaeon plan --trace`: a day on nodes, and how few devices it needs."""

import json

import msgspec
import pytest

from aegaeon.cli import main
from aegaeon.day_runs import Search
from aegaeon.errors import ConfigError
from aegaeon.plan_day import plan_day_command
from tests.support.simulated import COSTS, LENGTHS


@pytest.fixture
def files(tmp_path):
    costs, trace = tmp_path / "costs.json", tmp_path / "trace.csv"
    costs.write_bytes(msgspec.json.encode(COSTS))
    rows = [
        f"2023-11-16 {18 + second // 3600}:{second // 60 % 60:02d}:{second % 60:02d}.0,{p},{o}"
        for second, (p, o) in zip(range(0, 1500, 5), LENGTHS * 60, strict=True)
    ]
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows))
    return ["--costs", str(costs), "--trace", str(trace), "--hours", "2", "--jobs", "1"]


SMALL = ["--models", "12", "--rate", "1", "--devices-per-node", "2", "--samples", "8"]


def test_a_day_says_what_was_kept_and_how_sure_that_is(files):
    lost = ["--mtbf-hours", "2", "--notice-s", "2"]
    (text,) = plan_day_command([*files, *SMALL, "--devices", "6", *lost, "--json"])
    day = json.loads(text)
    assert (day["devices"], day["nodes"], day["models"], day["hours"]) == (6, 3, 12, 2)
    assert day["requests"] == pytest.approx(7200)
    assert 0.9 < day["attainment_request"] <= 1.0 and 0.0 <= day["error"] < 0.1
    assert day["samples"] == 8 and day["simulated_requests"] > 50
    assert [hour["samples"] for hour in day["by_hour"]] == [4, 4]
    assert day["losses"]["losses"] >= 1 and day["losses"]["samples"] >= 1
    assert day["losses"]["longest_s"] > 2.0


def test_several_processes_come_to_the_same(files):
    found = []
    for jobs in ("1", "2"):
        (text,) = plan_day_command([*files[:-1], jobs, *SMALL, "--devices", "4", "--json"])
        day = json.loads(text)
        found.append({key: day[key] for key in day if key not in ("wall_s", "placement_s")})
    assert found[0] == found[1]


def test_a_day_is_printed_for_people(files, capsys):
    assert main(["plan", *files, *SMALL, "--devices", "4"]) == 0
    said = capsys.readouterr().out
    assert "slack on 4 devices of 2 nodes: 7,200 requests for 12 models in 2 h" in said
    assert "±" in said and "models without room" in said


def test_more_load_needs_more_devices_and_the_picture_shows_it(files, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "needed.svg"
    asked = ["--loads", "1,6", "--policies", "slack", "--slo-ttft", "3", "--slo-tbt", "0.05"]
    more = ["--picture", str(picture), "--max-devices", "64", "--json"]
    (text,) = plan_day_command([*files, *SMALL, *asked, *more])
    less, many = json.loads(text)["points"]
    assert (less["requests_per_s"], many["requests_per_s"]) == pytest.approx((1.0, 6.0))
    assert less["devices"] < many["devices"]
    for point in (less, many):
        kept = {tried["devices"]: tried["attainment_request"] for tried in point["tried"]}
        assert kept[point["devices"]] >= 0.9
        fewer = [share for devices, share in kept.items() if devices < point["devices"]]
        assert all(share < 0.9 for share in fewer)
    assert "devices needed" in picture.read_text()


def test_a_load_that_the_most_devices_cannot_keep_is_said(files):
    asked = ["--loads", "6", "--max-devices", "2", "--json"]
    (text,) = plan_day_command([*files, *SMALL, *asked])
    (point,) = json.loads(text)["points"]
    assert point["devices"] is None and point["attainment_request"] < 0.9


def test_no_number_of_devices_is_enough_where_models_never_have_room(files):
    few = ["--cache-gb", "10", "--rate", "0.2", "--max-devices", "8", "--json"]
    (text,) = plan_day_command([*files, *SMALL, *few])
    (point,) = json.loads(text)["points"]
    assert point["devices"] is None and point["attainment_request"] < 0.9


def test_models_without_room_count_as_missed(files):
    less = ["--cache-gb", "20", "--devices", "4", "--json"]
    (text,) = plan_day_command([*files, *SMALL, *less])
    day = json.loads(text)
    assert day["left"] > 0 and day["attainment_request"] < 0.8


def test_devices_are_enough_only_where_every_model_has_room(files):
    few = ["--cache-gb", "40", "--rate", "0.2", "--json"]
    (text,) = plan_day_command([*files, *SMALL, *few])
    (point,) = json.loads(text)["points"]
    assert [tried["devices"] for tried in point["tried"]] == [8]  # fewer are not even simulated
    assert point["devices"] == 8  # 132 GB of weights, 40 GB on each pair of devices


def test_nodes_that_cannot_hold_all_weights_are_not_tried_and_the_others_once(files, monkeypatch):
    tried = []
    lacks_room = Search._lacks_room

    def noted(self, nodes):
        tried.append((self.factor, nodes))
        return lacks_room(self, nodes)

    monkeypatch.setattr(Search, "_lacks_room", noted)
    few = ["--cache-gb", "30", "--rate", "0.2", "--policies", "slack,request", "--loads", "1,2"]
    plan_day_command([*files, *SMALL, *few, "--json"])
    assert min(nodes for _, nodes in tried) == 5  # 132 GB of weights
    assert len(tried) == len(set(tried)) and {factor for factor, _ in tried} == {1.0, 2.0}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--devices", "5"], "whole nodes of 2"),
        (["--devices", "4", "--policies", "slack,request"], "one of --policies"),
        (["--devices", "4", "--samples", "3"], "--samples is at least 8"),
        (["--devices", "4", "--rate", "0"], "--rate"),
        (["--devices", "4", "--shape", "1,x"], "--shape"),
        (["--devices", "4", "--jobs", "0"], "--jobs"),
        (["--devices", "4", "--policies", "best"], "unknown policy"),
        (["--loads", "0"], "--loads"),
        (["--picture", "needed.doc"], "no .svg or .png"),
        (["--picture", "nowhere-to-be/needed.svg"], "no folder"),
    ],
)
def test_what_makes_no_sense_is_refused(files, more, words):
    with pytest.raises(ConfigError, match=words):
        plan_day_command([*files, *SMALL, *more])
