"""The mix of models and the prompts of a load."""

import pytest

from aegaeon.errors import ConfigError
from aegaeon.workload import make_prompt, mix_models


def test_round_robin_changes_the_model_with_every_request():
    assert mix_models("abc", 7, "round_robin") == tuple("abcabca")


def test_grouped_changes_the_model_after_each_group():
    assert mix_models("ab", 7, "grouped", group_size=3) == tuple("aaabbba")


def test_random_is_the_same_for_the_same_seed_only():
    first = mix_models("abc", 40, "random", seed=1)
    assert first == mix_models("abc", 40, "random", seed=1)
    assert first != mix_models("abc", 40, "random", seed=2)
    assert set(first) == set("abc")


def test_a_load_without_models_or_with_empty_groups_is_refused():
    with pytest.raises(ConfigError, match="--models"):
        mix_models([], 1, "round_robin")
    with pytest.raises(ConfigError, match="--group-size"):
        mix_models("a", 1, "grouped", group_size=0)


def test_prompts_have_the_asked_length_and_differ_by_seed():
    assert {len(make_prompt(chars, 3)) for chars in (0, 1, 200)} == {0, 1, 200}
    assert make_prompt(200, 3) == make_prompt(200, 3) != make_prompt(200, 4)
