"""What actions take, and files that say so."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegaeon.errors import ConfigError
from aegaeon.scheduler.cost import Costs, ModelCost, decode_costs

SMALL = ModelCost(
    weight_gb=14, kv_gb_per_token=0.5e-3, max_len=8192, prefill=(2e-5, -1e-9, 0.01),
    decode=(-1e-6, 1e-4, 0.01),
)  # fmt: skip
LARGE = msgspec.structs.replace(SMALL, weight_gb=26)
COSTS = Costs(
    link_gb_per_s=16, device_memory_gb=80, models={"small": SMALL, "large": LARGE},
    model_mix=("small", "small", "large"),
)  # fmt: skip
FILE = msgspec.to_builtins(COSTS)


def test_times_are_linear_in_what_is_computed():
    assert SMALL.prefill_s(1000) == pytest.approx(0.02 - 0.001 + 0.01)
    assert SMALL.prefill_s(1000, squares=500_000) == pytest.approx(0.02 - 0.0005 + 0.01)
    assert SMALL.decode_s(0, 8) == pytest.approx(0.0108)
    assert COSTS.load_s(LARGE) == pytest.approx(26 / 16)
    assert COSTS.move_s(SMALL, 3200) == pytest.approx(0.1)


def test_loads_and_moves_have_constants_where_a_file_says_so():
    costs = msgspec.structs.replace(COSTS, load_fixed_s=0.1, move_fixed_s=0.01)
    assert costs.load_s(LARGE) == pytest.approx(26 / 16 + 0.1)
    assert costs.move_s(SMALL, 3200) == pytest.approx(0.11)
    slow = msgspec.structs.replace(LARGE, load_factor=2.0)
    assert costs.load_s(slow) == pytest.approx(2 * costs.load_s(LARGE))


def test_a_device_in_the_host_s_memory_moves_no_keys_and_values():
    in_place = msgspec.structs.replace(COSTS, is_kv_moved=False, move_fixed_s=0.01)
    assert in_place.move_s(SMALL, 3200) == 0
    assert in_place.load_s(SMALL) == COSTS.load_s(SMALL)


@given(st.integers(0, 10**7), st.integers(0, 4096))
def test_a_fit_with_a_negative_slope_never_makes_time_run_backwards(tokens, requests):
    assert SMALL.decode_s(tokens, requests) >= 0.01
    assert SMALL.prefill_s(tokens) >= 0.01


def test_kinds_go_round_in_the_order_of_appearance():
    kinds = COSTS.of(("a", "b", "c", "d", "large"))
    assert [kinds[model] for model in "abcd"] == [SMALL, SMALL, LARGE, SMALL]
    assert kinds["large"] is LARGE


def test_a_file_need_not_say_what_is_optional():
    plain = {name: FILE[name] for name in ("link_gb_per_s", "device_memory_gb", "model_mix")}
    model = {key: value for key, value in FILE["models"]["small"].items() if key != "load_factor"}
    models = dict.fromkeys(("small", "large"), model)
    costs = decode_costs(msgspec.json.encode(plain | {"models": models}), "costs.json")
    assert (costs.switch_s, costs.load_fixed_s, costs.is_kv_moved) == (0.005, 0, True)
    assert costs.models["small"] == SMALL


def test_a_file_says_what_it_was_made_of():
    assert decode_costs(msgspec.json.encode(COSTS), "costs.json") == COSTS
    assert decode_costs(msgspec.json.encode(FILE | {"source": "a fit"}), "costs.json") == COSTS


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"link_gb_per_s": 0}, "link_gb_per_s"),
        ({"models": {}}, "models"),
        ({"model_mix": ["huge"]}, "'huge'"),
        ({"model_mix": []}, "model_mix"),
        ({"device_memory_gb": 26}, "large has 26 GB of weights"),
        ({"models": {"small": {"weight_gb": 1}}}, "missing required field"),
        (
            {"models": FILE["models"] | {"large": FILE["models"]["small"] | {"quantize": "int4"}}},
            "int4",
        ),
    ],
)
def test_a_file_that_makes_no_sense_is_named_with_the_reason(changes, words):
    with pytest.raises(ConfigError, match=r"costs\.json") as raised:
        decode_costs(msgspec.json.encode(FILE | changes), "costs.json")
    assert words in str(raised.value)


@given(st.binary(max_size=200))
def test_other_bytes_are_refused(data):
    with pytest.raises(ConfigError):
        decode_costs(data, "costs.json")
