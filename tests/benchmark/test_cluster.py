"""benchmark/cluster.py places and routes; here among few nodes, where figures say nothing."""

import json

from benchmark import cluster


def test_it_says_how_fast_models_are_placed_and_requests_routed(monkeypatch, capsys):
    for name, value in (("NODES", 6), ("MODELS", 30), ("ROUTED", 50), ("REPEATS", 1)):
        monkeypatch.setattr(cluster, name, value)
    monkeypatch.setattr(cluster, "REQUESTS_PER_S", 40.0)
    assert cluster.main(["--json"]) == 0
    rows = {row["case"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    placed = rows["placement decisions, 30 models on 48 devices of 6 nodes"]
    assert placed["ours"] > 0 and placed["unit"] == "decisions/s"
    assert 0 < rows["mean share, 30 models on 48 devices of 6 nodes"]["ours"] < 1
    assert sum("requests routed" in case for case in rows) == 4
