"""Loads: read, generated, laid over each other."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegaeon.errors import ConfigError
from aegaeon.scheduler.cost import Costs, ModelCost
from aegaeon.sim.workloads import (
    Arrival,
    apart,
    burst,
    fit_lengths,
    models_of,
    poisson,
    prepare,
    read_load,
    superpose,
)

PAPER = """Request Time,Model Name,Input Length,Output Length
00:00:02.253,b,438,88
00:00:00.418,a,168,416
01:02:03.5,a,1,0
"""
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
COST = ModelCost(1, 0, 4096, (0, 0, 0.1), (0, 0, 0.1))
OTHER = ModelCost(2, 0, 8192, (0, 0, 0.1), (0, 0, 0.1))
COSTS = Costs(16, 80, {"one": COST, "two": OTHER}, ("one", "two"))


@pytest.fixture
def written(tmp_path):
    def write(text, name="load.csv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_the_papers_files_are_read_in_order_of_time(written):
    load = read_load(written(PAPER))
    assert load == (
        Arrival(0.418, "a", 168, 416),
        Arrival(2.253, "b", 438, 88),
        Arrival(3723.5, "a", 1, 1),
    )
    assert read_load(written("\ufeff" + PAPER), horizon_s=2.0) == load[:1]


def test_azures_files_count_from_their_first_request(written):
    load = read_load(written(AZURE, "code.csv"))
    assert load[0] == Arrival(0.0, "code", 374, 44)
    assert load[1].at_s == pytest.approx(4.314579, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no header"),
        ("a,b\n1,2\n", "a, b"),
        (PAPER.replace("438", "many"), "line 2: Input Length is 'many'"),
        (PAPER.replace("438", "-1"), "line 2: Input Length"),
        (PAPER.replace("00:00:02.253", "noon"), "line 2: Request Time"),
        (PAPER.replace("00:00:02.253", "00:00:nan"), "line 2: Request Time"),
        (PAPER + "00:00:04,c\n", "line 5: Input Length is None"),
        (AZURE.replace("2023-11-16 18:15:50.9951690", "later"), "line 3: TIMESTAMP"),
        (b"\xff\xfe\x00", "no CSV"),
    ],
)
def test_a_file_that_is_no_load_is_refused_with_the_place(written, text, words):
    with pytest.raises(ConfigError) as raised:
        read_load(written(text))
    assert words in str(raised.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.csv"):
        read_load(tmp_path / "missing.csv")


def test_further_loads_are_shifted_round_the_horizon_and_tiled():
    first, second = (Arrival(1.0, "a", 5, 6),), (Arrival(90.0, "a", 7, 8),)
    once = superpose(apart((first, second)), 37.0, 120.0)
    assert once == (Arrival(1.0, "a", 5, 6), Arrival(7.0, "x1_a", 7, 8))
    twice = superpose(apart((first, second)), 37.0, 120.0, tile=2)
    assert [one.at_s for one in twice] == [1.0, 7.0, 121.0, 127.0]


@pytest.mark.parametrize("bad", [(-1.0, 120.0, 1), (37.0, 0.0, 1), (37.0, 120.0, 0)])
def test_no_load_is_laid_out_backwards(bad):
    with pytest.raises(ConfigError, match="--horizon"):
        superpose(((Arrival(1.0, "a", 5, 6),),), *bad)


def test_each_load_has_the_whole_mix_of_kinds():
    load = (Arrival(0.0, "b", 1, 1), Arrival(1.0, "a", 1, 1))
    everything, kinds = prepare((load, load), COSTS, 37.0, 120.0, 1)
    assert kinds == {"b": COST, "a": OTHER, "x1_b": COST, "x1_a": OTHER}
    assert set(models_of(everything)) == set(kinds)


@given(st.integers(1, 200_000), st.integers(1, 200_000))
def test_lengths_fit_their_model_afterwards(prompt, output):
    (fitted,) = fit_lengths((Arrival(0.0, "a", prompt, output),), {"a": COST})
    assert fitted.prompt_tokens >= 1 <= fitted.output_tokens
    assert fitted.prompt_tokens + fitted.output_tokens <= COST.max_len
    if prompt + output <= COST.max_len:
        assert (fitted.prompt_tokens, fitted.output_tokens) == (prompt, output)


def test_poisson_arrivals_have_the_rate_that_was_asked_for():
    load = poisson(20, 0.5, 2000.0, [(10, 20), (30, 40)], seed=1)
    assert len(load) == pytest.approx(20_000, rel=0.03)
    assert list(load) == sorted(load, key=lambda one: one.at_s)
    assert load == poisson(20, 0.5, 2000.0, [(10, 20), (30, 40)], seed=1)
    assert {(one.prompt_tokens, one.output_tokens) for one in load} == {(10, 20), (30, 40)}


def test_popularity_follows_a_power_law():
    count = Counter(one.model for one in poisson(10, 1.0, 4000.0, [(1, 1)], zipf=1.0, seed=2))
    assert count["model-0000"] / count["model-0004"] == pytest.approx(5, rel=0.15)


def test_a_burst_multiplies_what_comes_while_it_lasts():
    load = (Arrival(1.0, "a", 1, 1), Arrival(5.0, "a", 1, 1), Arrival(7.0, "a", 1, 1))
    assert [one.at_s for one in burst(load, 5.0, 2.0, 3)] == [1.0, 5.0, 5.0, 5.0, 7.0]


def test_a_load_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="rate"):
        poisson(0, 1.0, 1.0, [(1, 1)])
