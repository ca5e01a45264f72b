"""Which devices a policy gets, and how few a load needs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegaeon.errors import ConfigError
from aegaeon.sim.fleets import make_fleet, policy_of
from aegaeon.sim.sizing import find_least


def test_devices_do_both_unless_the_policy_or_somebody_splits_them():
    assert make_fleet("slack", 16).roles == ("colocated",) * 16
    assert make_fleet("request", 3).roles == ("colocated",) * 3
    assert make_fleet("paper", 16).roles == ("prefill",) * 6 + ("decode",) * 10
    assert make_fleet("paper", 2).roles == ("prefill", "decode")
    assert make_fleet("slack", 3, prefill=1).roles == ("prefill", "decode", "decode")
    assert make_fleet("paper", 2, prefill=0).roles == ("colocated", "colocated")


@pytest.mark.parametrize(
    ("policy", "devices", "prefill", "words"),
    [
        ("slack", 0, None, "--devices 1 or more"),
        ("paper", 1, None, "2 --devices"),
        ("slack", 4, 4, "between 1 and 3"),
        ("slack", 4, -1, "between 1 and 3"),
    ],
)
def test_a_fleet_that_cannot_serve_is_refused(policy, devices, prefill, words):
    with pytest.raises(ConfigError, match=words):
        make_fleet(policy, devices, prefill=prefill)


def test_an_unknown_policy_is_refused_with_those_there_are():
    assert policy_of("slack").name == "slack"
    with pytest.raises(ConfigError, match="'x'; choose from slack"):
        policy_of("x")


@given(st.integers(1, 70), st.integers(1, 4), st.integers(1, 64))
def test_the_least_number_of_devices_is_found(needed, first, most):
    most = max(first, most)
    runs = []

    def kept(devices):
        runs.append(devices)
        return 0.95 if devices >= needed else 0.5

    found = find_least("slack", kept, first=first, most=most)
    least = max(needed, first)
    assert found.devices == (least if least <= most else None)
    assert found.attainment_request == (0.95 if least <= most else 0.5)
    assert len(runs) == len(set(runs)) <= 14
    assert [devices for devices, _ in found.tried] == sorted(runs)
