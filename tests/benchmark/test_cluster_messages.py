"""benchmark/cluster_messages.py sends by all ways; here few records, where figures say nothing."""

import json

from benchmark import cluster_messages
from tests.support.redis_server import require_redis


def test_it_tells_times_and_rates_of_mailboxes_against_bare_redis(capsys, monkeypatch):
    require_redis()
    monkeypatch.setattr(cluster_messages, "FLOODS", {"256 B": (256, 50)})
    assert cluster_messages.main(["--json", "--quick"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    told = {(row["case"], row["peer"]) for row in rows}
    cases = [f"{way} p{p}, 256 B" for way in ("one way", "there and back") for p in (50, 99)]
    cases.append("records/s, 256 B")
    assert told == {(case, peer) for case in cases for peer in ("XADD, XREAD", "PUBLISH")}
    assert all(row["ours"] > 0 and row["peer_value"] > 0 and row["limit"] > 0 for row in rows)
    one_way = next(row for row in rows if row["case"].startswith("one way p50"))
    both = next(row for row in rows if row["case"].startswith("there and back p50"))
    assert one_way["ours"] < both["ours"]
