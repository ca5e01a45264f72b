"""The relay benchmark: its figures, and one small run of all its processes."""

import json

import msgspec
import pytest

from benchmark import relay
from benchmark.relay_instance import Stamp
from benchmark.relay_rows import Case, Relayed, Sample, relayed, rows_of
from benchmark.serving import ServerError
from benchmark.stream_client import Exchange
from tests.support.checkpoints import make_checkpoint


def make_exchange(name, times_s):
    exchange = Exchange("/", b"", 0.0, begun_s=0.0, id=name)
    exchange.token_times_s, exchange.chunks = list(times_s), len(times_s)
    return exchange


def test_delays_count_while_all_streams_are_open():
    stamps = [Stamp(f"{name}.0", at, 1, at + 1.0) for name in "ab" for at in range(10)]
    # The second ends early; what comes later, late, does not count.
    a = [at + 1.001 for at in range(8)] + [19.0, 20.0]
    exchanges = [make_exchange("a", a), make_exchange("b", [at + 1.003 for at in range(8)])]
    samples = [Sample(0.0, 0.0), Sample(2.0, 1.0), Sample(21.0, 1.5)]
    found = relayed(exchanges, samples, msgspec.msgpack.encode(stamps))
    assert found.p50_s == pytest.approx(0.002, abs=0.0011)
    assert found.p99_s == pytest.approx(0.003, abs=1e-4)
    assert found.tokens_per_processor_s == pytest.approx(16 / 0.5)
    assert found.tokens_per_s == pytest.approx(16 / 19)
    assert found.frames == 1
    with pytest.raises(ServerError, match="too short"):
        relayed(exchanges, samples[-1:], msgspec.msgpack.encode(stamps))


def test_rows_have_latencies_where_there_is_a_pace():
    run = Relayed(0.0005, 0.004, 60_000.0, 4000.0, 1.0)
    bare = [Relayed(0.0001, 0.001, 90_000.0, 4000.0, 1.0)]
    paced = rows_of(Case("x", 1, 0.05, 9), 200, [run], [run], bare)
    assert [(row.case.split(",")[0], row.met) for row in paced if row.aim] == [
        ("added to a token over bare sends", True),
        ("added to a token over bare sends", True),
    ]
    full = rows_of(Case("x", 1, 0.0, 9), 200, [run], [])
    assert [row.met for row in full if row.aim] == [True]
    assert not any(row.case.startswith("added") for row in full)


def test_what_is_added_is_the_median_of_the_rounds_differences():
    def run(p50_ms, p99_ms):
        return Relayed(p50_ms / 1e3, p99_ms / 1e3, 60_000.0, 4000.0, 1.0)

    ours = [run(3.0, 9.0), run(2.0, 8.0), run(9.0, 5.0)]
    bare = [run(1.5, 2.0), run(1.8, 2.5), run(1.0, 3.0)]
    rows = rows_of(Case("x", 1, 0.05, 9), 200, ours, [], bare)
    found = {row.case.split(", 200")[0]: row for row in rows}
    p50, p99 = (found[f"added to a token over bare sends, {name}"] for name in ("p50", "p99"))
    assert (round(p50.ours, 9), p50.met, round(p99.ours, 9), p99.met) == (1.5, False, 5.5, False)
    whole = found["from record to client, p50"]
    assert (whole.ours, whole.limit, whole.aim) == (3.0, 1.5, None)


def test_a_small_run_relays_every_token(tmp_path, capsys):
    make_checkpoint(tmp_path / "models" / "m", "llama")
    arguments = ["--models-dir", str(tmp_path / "models"), "--model", "m", "--streams", "4"]
    arguments += ["--tokens", "60", "--tokens-per-s", "40", "--rounds", "1", "--cases", "batch"]
    assert relay.main([*arguments, "--json"]) == 0, capsys.readouterr().err
    rows = json.loads(capsys.readouterr().out)["rows"]
    added = [row for row in rows if row["case"].startswith("added")]
    assert len(added) == 2 and all(row["met"] is not None for row in added)
    assert all(row["ours"] > 0 and row["peer_value"] > 0 for row in rows if row not in added)
    assert [row["limit"] > 0 for row in rows if row["unit"] == "ms" and row not in added] == [
        True
    ] * 2
    (rate,) = [row["ours"] for row in rows if row["case"].startswith("tokens, ")]
    assert rate <= 4 * 40 * 1.5


def test_an_unknown_case_is_refused(capsys):
    assert relay.main(["--cases", "none"]) == 1
    assert "no case 'none'" in capsys.readouterr().err
