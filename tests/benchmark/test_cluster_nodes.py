"""benchmark/cluster_nodes.py predicts and climbs; serving needs Ray, and is tried where it is."""

import json
import os
import signal
import subprocess

import pytest

from aegaeon.metrics import goodput
from benchmark import cluster_nodes
from benchmark.cluster_nodes import climb
from benchmark.random_model import SMALL, write_model
from benchmark.serving import ServerError
from tests.support.polling import eventually
from tests.support.ray_cluster import require_ray
from tests.support.redis_server import require_redis
from tests.support.smollm2 import smollm2_directory


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    write_model(directory / "small", SMALL)
    return directory


def told(capsys, models_dir, *flags):
    common = ("--models-dir", str(models_dir), "--model", "small", "--models", "2", "--json")
    assert cluster_nodes.main([*common, *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_two_nodes_are_predicted_to_serve_as_much_as_two(capsys, models_dir):
    report = told(capsys, models_dir, "--simulated", "--horizon-s", "20")
    (row,) = report["rows"]
    assert row["case"] == "goodput of two nodes by that of one, predicted"
    assert row["met"] and row["ours"] >= 1.8
    assert report["skipped"] == []


def test_without_ray_it_says_that_nothing_was_served(capsys, models_dir, monkeypatch):
    monkeypatch.setattr(cluster_nodes, "missing", lambda: "nothing was served: no Ray")
    report = told(capsys, models_dir, "--horizon-s", "10")
    assert report["skipped"] == ["nothing was served: no Ray"]
    assert len(report["rows"]) == 1


@pytest.mark.parametrize("knee", [0.3, 1.0, 2.7, 9.0])
def test_a_climb_ends_with_the_knee_between_two_rates(knee):
    found = climb(lambda rate: 1.0 if rate <= knee else 0.5, 2.0, 1.5)
    assert max(rate for rate, share in found.items() if share == 1.0) <= knee
    assert min(rate for rate, share in found.items() if share < 1.0) > knee
    assert knee / 1.5 < goodput(found.items()) <= 1.5 * knee


def test_a_climb_without_a_knee_ends():
    for share in (0.0, 1.0):
        asked = []

        def always(rate, share=share, asked=asked):
            asked.append(rate)
            return share

        with pytest.raises(ServerError, match="no knee"):
            climb(always, 1.0, 1.15)
        assert len(asked) == cluster_nodes.MOST_RATES


def test_processor_time_is_also_that_of_grandchildren():
    before_s = cluster_nodes.processor_s()
    script = "while :; do :; done"
    child = subprocess.Popen(["sh", "-c", f"sh -c '{script}' & wait"], start_new_session=True)
    try:
        eventually(lambda: cluster_nodes.processor_s() > before_s + 0.1)
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


@pytest.mark.thorough
def test_it_serves_on_one_node_and_on_two(capsys):
    require_ray()
    require_redis()
    models_dir = smollm2_directory().parent
    flags = ("--models-dir", str(models_dir), "--models", "2", "--horizon-s", "3", "--json")
    assert cluster_nodes.main([*flags, "--step", "2"]) == 0
    rows = {row["case"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["goodput, 1 node"]["ours"] > 0 < rows["goodput, 2 nodes"]["ours"]
    assert rows["goodput of two nodes by that of one, served"]["aim"] == ">= 1.8"
