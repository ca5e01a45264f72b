"""Traces as days: counts and lengths of what a file says, again and again."""

import pytest

from aegaeon.errors import ConfigError
from aegaeon.sim.traces import Profile, laid_over, popularity, read_profile

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.fixture
def written(tmp_path):
    def write(text, name="trace.csv"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_windows_count_requests_and_the_last_part_of_one_is_left_out(written):
    rows = [f"2024-05-10 00:{m:02d}:00.5000000+00:00,{100 + m},{m + 1}" for m in range(12)]
    found = read_profile(written(AZURE + "\n".join(rows)), window_s=300.0)
    assert found.requests_per_s == (5 / 300, 5 / 300)
    assert found.lengths == tuple((100 + m, m + 1) for m in range(12))
    assert found.requests == pytest.approx(10)


def test_burstgpt_is_read_without_its_failures(written):
    text = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    text += "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,30,0,30,API log\n"
    text += "605,GPT-4,31,7,38,API log\n"
    found = read_profile(written(text), window_s=300.0)
    assert found.requests_per_s == (1 / 300, 0.0)
    assert found.lengths == ((472, 18), (31, 7))


def test_a_trace_shorter_than_a_window_has_its_own_rate(written):
    text = AZURE + "2023-11-16 18:17:00.0,10,1\n2023-11-16 18:17:10.0,10,1\n"
    assert read_profile(written(text)).requests_per_s == (0.2,)


def test_a_day_repeats_its_trace_and_keeps_the_mean():
    hour = Profile(300.0, (1.0, 3.0), ((1, 1),))
    day = hour.lasting(1800.0)
    assert day.requests_per_s == (1.0, 3.0, 1.0, 3.0, 1.0, 3.0)
    shaped = hour.lasting(1200.0, (0.0, 1.0))
    assert shaped.requests_per_s == (0.0, 0.0, 2.0, 6.0) and shaped.mean == hour.mean
    assert day.scaled(2.0).requests == 2 * day.requests


@pytest.mark.parametrize(("seconds", "shape"), [(100.0, (1.0,)), (600.0, (-1.0,)), (600.0, (0.0,))])
def test_a_day_of_nothing_is_refused(seconds, shape):
    with pytest.raises(ConfigError, match="a day lasts"):
        Profile(300.0, (1.0,), ((1, 1),)).lasting(seconds, shape)


def test_traces_laid_over_each_other_give_lengths_by_their_rates():
    both = laid_over([Profile(300.0, (3.0, 1.0), ((1, 1),)), Profile(300.0, (6.0,), ((2, 2),))])
    assert both.requests_per_s == (9.0, 7.0)
    assert both.lengths.count((2, 2)) == 3 * both.lengths.count((1, 1))


def test_an_empty_trace_is_refused(written):
    with pytest.raises(ConfigError, match="has no requests"):
        read_profile(written(AZURE))


def test_popularity_sums_to_one_and_falls():
    shares = list(popularity(50, 1.2).values())
    assert sum(shares) == pytest.approx(1.0) and shares == sorted(shares, reverse=True)
    with pytest.raises(ConfigError, match="--models"):
        popularity(0, 1.0)
