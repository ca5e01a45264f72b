"""Flags that name a load."""

import argparse

import msgspec
import pytest

from aegaeon.errors import ConfigError
from aegaeon.flags import Parser
from aegaeon.load_flags import add_load_flags, case_of, rates_of, with_popularity
from tests.support.simulated import COSTS

HEADER = "Request Time,Model Name,Input Length,Output Length\n"


@pytest.fixture
def files(tmp_path):
    (tmp_path / "costs.json").write_bytes(msgspec.json.encode(COSTS))
    for name, second in (("one", 10), ("two", 50), ("late", 119)):
        rows = f"00:00:{second % 60:02d},{name},30,4\n00:{second // 60:02d}:59,{name},40,2\n"
        (tmp_path / f"{name}.csv").write_text(HEADER + rows)
    (tmp_path / "empty.csv").write_text(HEADER)
    return tmp_path


def case(files, *flags):
    parser = Parser(prog="x")
    add_load_flags(parser)
    names = [str(files / flag) if flag.endswith(".csv") else flag for flag in flags]
    return case_of(parser.parse_args([*names, "--costs", str(files / "costs.json")]))


def test_several_files_are_laid_over_each_other_with_models_of_their_own(files):
    both = case(files, "-w", "one.csv", "two.csv", "--horizon", "60")
    assert [(one.at_s, one.model) for one in both.load] == [
        (10.0, "one"),
        (27.0, "x1_two"),
        (36.0, "x1_two"),
        (59.0, "one"),
    ]
    twice = case(files, "-w", "one.csv", "two.csv", "--horizon", "60", "--tile", "2")
    assert len(twice.load) == 8 and twice.load[4].at_s == 70.0
    assert set(both.models) == {"one", "x1_two"}


def test_a_single_file_is_taken_whole_unless_a_horizon_cuts_it(files):
    assert len(case(files, "-w", "late.csv").load) == 2
    assert len(case(files, "-w", "late.csv", "--horizon", "100").load) == 1


def test_promises_and_the_link_are_those_of_the_flags(files):
    usual = case(files, "-w", "one.csv")
    assert (usual.target.ttft_s, usual.target.tbt_s, usual.costs) == (10.0, 0.1, COSTS)
    other = case(files, "-w", "one.csv", "--slo-ttft", "2", "--slo-tbt", "0.05")
    assert (other.target.ttft_s, other.target.tbt_s) == (2.0, 0.05)
    assert case(files, "-w", "one.csv", "--link-gb-per-s", "64").costs.link_gb_per_s == 64


def test_a_generated_load_draws_lengths_from_the_file_and_is_the_same_by_seed(files):
    flags = ("--models", "5", "--rates", "0.5", "--lengths", "one.csv")
    load = case(files, *flags).load
    assert len(load) > 100 and len({one.model for one in load}) == 5
    assert {(one.prompt_tokens, one.output_tokens) for one in load} == {(30, 4), (40, 2)}
    assert case(files, *flags).load == load
    assert case(files, *flags[:4], "-w", "one.csv").load == load
    assert case(files, *flags, "--seed", "1").load != load


def test_a_bursty_load_has_many_times_the_requests_in_its_middle(files):
    flags = ("--rates", "4x1", "--lengths", "one.csv")
    calm = case(files, *flags).load
    bursty = case(files, "--generate", "bursty", *flags, "--burst-factor", "3").load
    count = [sum(60 <= one.at_s < 65 for one in load) for load in (calm, bursty)]
    assert count[1] == 3 * count[0] > 0
    assert len(bursty) == len(calm) + 2 * count[0]


@pytest.mark.parametrize(
    ("models", "rates", "found"),
    [
        (None, "0.5", {"model-0000": 0.5}),
        ("2", "0.5", {"model-0000": 0.5, "model-0001": 0.5}),
        ("a, b", "1,2", {"a": 1.0, "b": 2.0}),
        ("a,b", "1", {"a": 1.0, "b": 1.0}),
        (None, "2x0.1,3", {"model-0000": 0.1, "model-0001": 0.1, "model-0002": 3.0}),
    ],
)
def test_rates_are_one_for_all_or_one_for_each(models, rates, found):
    assert rates_of(models, rates) == found


@pytest.mark.parametrize(
    ("models", "rates"),
    [("3", "1,2"), ("a,a", "1"), ("a,", "1"), (None, "fast"), (None, "1.5x2"), ("a", "-1")],
)
def test_rates_that_fit_no_models_are_refused(models, rates):
    with pytest.raises(ConfigError, match="--rates"):
        rates_of(models, rates)


def test_popularity_moves_requests_but_keeps_their_number():
    rates = with_popularity({"a": 1.0, "b": 1.0, "c": 1.0}, zipf=1.0)
    assert sum(rates.values()) == pytest.approx(3.0)
    assert rates["a"] == pytest.approx(2 * rates["b"]) == pytest.approx(3 * rates["c"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "name the load"),
        (("-w", "nowhere.csv"), "cannot read .*nowhere.csv"),
        (("-w", "empty.csv"), "has no requests"),
        (("-w", "one.csv", "--tile", "0"), "--tile at least 1"),
        (("-w", "one.csv", "--slo-tbt", "0"), "--slo-tbt are seconds above 0"),
        (("-w", "one.csv", "--link-gb-per-s", "0"), "--link-gb-per-s is above 0"),
        (("--models", "3"), "needs --rates"),
        (("--rates", "1"), "needs --lengths"),
        (("--rates", "1", "--lengths", "one.csv", "--horizon", "0"), "--horizon"),
        (("--generate", "bursty", "--rates", "1", "--lengths", "one.csv", "--burst-s", "0"), "-s"),
        (("-w", "one.csv", "--shift", "soon"), "invalid float"),
    ],
)
def test_flags_that_make_no_load_are_refused_with_the_remedy(files, flags, words):
    with pytest.raises(ConfigError, match=words):
        case(files, *flags)


def test_costs_that_are_not_there_are_named(files):
    with pytest.raises(ConfigError, match=r"cannot read --costs .*nowhere"):
        case_of(
            argparse.Namespace(
                slo_ttft=1.0, slo_tbt=1.0, costs=str(files / "nowhere"), link_gb_per_s=None
            )
        )
