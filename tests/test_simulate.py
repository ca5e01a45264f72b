"""`aegaeon simulate` and `aegaeon plan --costs`, as users type them."""

import json
import sys

import msgspec
import pytest

from aegaeon import simulate as command
from aegaeon.cli import main
from aegaeon.errors import ConfigError
from aegaeon.scheduler.policies import POLICIES
from aegaeon.simulate import failures_of, make_parser, simulate_command
from tests.support.simulated import COSTS

KEYS = {
    *("models", "requests", "tokens", "attainment_time", "attainment_token"),
    *("attainment_request", "switches", "wall_s", "per_model"),
}


@pytest.fixture
def load(tmp_path):
    """The flags of a small load."""
    (tmp_path / "costs.json").write_bytes(msgspec.json.encode(COSTS))
    rows = [f"00:00:{n:02d},m{n % 5},{20 * n + 5},{7 * n + 1}\n" for n in range(30)]
    text = "Request Time,Model Name,Input Length,Output Length\n" + "".join(rows)
    (tmp_path / "load.csv").write_text(text)
    return ["-w", str(tmp_path / "load.csv"), "--costs", str(tmp_path / "costs.json")]


def report(*flags):
    (text,) = simulate_command([*flags, "--json"])
    return json.loads(text)


@pytest.mark.parametrize("policy", list(POLICIES))
def test_the_json_has_what_programs_look_for(load, policy):
    found = report(*load, "--devices", "3", "--policy", policy)
    assert set(found) >= KEYS
    assert (found["policy"], found["models"], found["requests"]) == (policy, 5, 30)
    assert sum(one["requests"] for one in found["per_model"]) == 30
    assert 0 <= found["attainment_request"] <= 1 and found["wall_s"] > 0


def test_files_are_superposed_and_repeated(load):
    twice = report("-w", load[1], *load[1:], "--devices", "3", "--tile", "2")
    assert (twice["models"], twice["requests"]) == (10, 120)


def test_the_same_command_gives_the_same_figures(load):
    first, second = (report(*load, "--devices", "2") for _ in range(2))
    del first["wall_s"], second["wall_s"]
    assert first == second


def test_devices_fail_when_they_are_told_to(load):
    whole, broken = (report(*load, "--devices", "2", *more) for more in ((), ("--fail", "10:0")))
    assert broken["tokens"] == whole["tokens"]
    assert broken["ttft_s"]["avg"] > whole["ttft_s"]["avg"]
    assert failures_of("") == () and len(failures_of("1:2,3.5:4")) == 2
    with pytest.raises(ConfigError, match="--fail soon"):
        failures_of("soon")


def test_the_command_line_prints_tables_for_people_and_json_for_programs(load, capsys):
    assert main(["simulate", *load, "--devices", "2"]) == 0
    shown = capsys.readouterr()
    assert "attainment_request" in shown.out and "m3" in shown.out
    assert shown.err == ""  # no bar where nobody watches
    assert main(["simulate", *load, "--devices", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"] == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--devices", "2", "--prefill-count", "2"], "leaves none to decode"),
        (["--devices", "2", "--policy", "best"], "unknown policy 'best'"),
        (["--devices", "some"], "invalid int"),
        ([], "required: --devices; see `aegaeon simulate --help`"),
        (["--devices", "2", "--fast"], "unrecognized arguments"),
        (["--devices", "2", "--timeline", "no/where.html"], "cannot write"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(load, capsys, flags, words):
    assert main(["simulate", *load, *flags]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert words in shown.err


def test_a_timeline_is_written(load, tmp_path):
    pytest.importorskip("bokeh", reason="Bokeh is not installed")
    page = tmp_path / "who.html"
    report(*load, "--devices", "2", "--timeline", str(page))
    assert "m3" in page.read_text()


def test_without_bokeh_a_timeline_is_refused_before_anything_runs(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "bokeh.embed", None)
    monkeypatch.delitem(sys.modules, "aegaeon.sim.picture", raising=False)
    monkeypatch.setattr(command, "case_of", None)
    with pytest.raises(ConfigError, match=r"needs bokeh.*pip install 'aegaeon\[sim\]'"):
        simulate_command([*load, "--devices", "2", "--timeline", "who.html"])


def test_the_help_teaches_by_examples():
    text = make_parser().format_help()
    assert text.count("aegaeon simulate ") >= 5
    assert "slack" in text and "--horizon" in text


def test_a_plan_finds_the_least_number_of_devices(load, capsys):
    flags = [*load, "--slo-ttft", "3", "--max-devices", "8"]
    assert main(["plan", *flags, "--policies", "slack", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["models"], plan["requests"], plan["policies"][0]["policy"]) == (5, 30, "slack")
    tried = dict(plan["policies"][0]["tried"])
    assert tried[plan["devices"]] >= 0.9
    assert plan["devices"] == 1 or tried[plan["devices"] - 1] < 0.9
    assert main(["plan", *flags]) == 0
    assert "policy" in capsys.readouterr().out


def test_a_plan_says_when_not_even_the_most_devices_suffice(load, capsys):
    flags = [*load, "--slo-ttft", "0.001", "--max-devices", "2", "--policies", "slack"]
    assert main(["plan", *flags]) == 0
    assert "more than 2" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--least", "0"], ["--max-devices", "1"], ["--policies", "x"]])
def test_a_plan_refuses_what_makes_no_sense(load, capsys, flags):
    assert main(["plan", *load, *flags]) == 2
    assert capsys.readouterr().err.startswith("aegaeon: error: ")
