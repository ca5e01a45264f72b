"""Costs of live instances, and the scheduler that is built with them."""

from typing import get_args, get_type_hints

import msgspec
import pytest

from aegaeon.config import Settings, check_settings
from aegaeon.engine.base import NullEngine
from aegaeon.errors import ConfigError
from aegaeon.instance.costs import costs_of, paced
from aegaeon.instance.launch import Launch
from aegaeon.instance.worker import build_scheduler
from aegaeon.scheduler.cost import Costs, ModelCost
from aegaeon.scheduler.learning import LearningCosts
from aegaeon.scheduler.policies import POLICIES
from aegaeon.scheduler.residency import Residency
from aegaeon.types import Decode, Load, Prefill
from tests.support.specs import make_request, make_spec

SPECS = (make_spec("a", 2_000_000_000), make_spec("b", 1_000_000_000))
MEASURED = ModelCost(
    weight_gb=9, kv_gb_per_token=1, max_len=9, prefill=(1, 0, 1), decode=(0, 0, 0.25)
)


def launch(**settings):
    return Launch(
        settings=check_settings(settings),
        specs=SPECS,
        instance="instance-0",
        index=0,
        incarnation=1,
        status_fd=0,
        parent_pid=1,
    )


def written(tmp_path, **types):
    """Costs of `a`, as measured with weights, keys and values of these types."""
    path = tmp_path / "costs.json"
    measured = msgspec.structs.replace(MEASURED, **types)
    costs = Costs(link_gb_per_s=7, device_memory_gb=80, models={"a": measured}, model_mix=("a",))
    path.write_bytes(msgspec.json.encode(costs))
    return str(path)


def guessed():
    return costs_of(check_settings({}), SPECS, 10**10)[0].models


def test_larger_models_are_guessed_to_be_slower():
    large, small = guessed()["a"], guessed()["b"]
    assert large.decode_s(0, 1) > small.decode_s(0, 1) > 0.01
    assert large.prefill_s(100) > small.prefill_s(100) > 0.1
    assert large.decode_s(10**6, 1) > large.decode_s(0, 1)


def test_measured_models_are_found_by_name_and_keep_their_own_sizes(tmp_path):
    costs, names = costs_of(check_settings({"costs_file": written(tmp_path)}), SPECS, 10**10)
    assert names == {"a"}
    assert costs.link_gb_per_s == 7 and set(costs.models) == {"a", "b"}
    a = costs.models["a"]
    assert (a.decode, a.prefill) == (MEASURED.decode, MEASURED.prefill)
    assert (a.weight_gb, a.max_len) == (2.0, SPECS[0].context_tokens)
    assert costs.models["b"] == guessed()["b"]


def test_copies_of_a_measured_model_cost_the_same(tmp_path):
    copies = (make_spec("x", 9_000_000_000), make_spec("y", 9_000_100_000))
    costs, names = costs_of(check_settings({"costs_file": written(tmp_path)}), copies, 10**11)
    assert names == {"x", "y"}
    assert costs.models["y"].decode == MEASURED.decode


@pytest.mark.parametrize(
    "types",
    [
        {"quantize": "int8"},
        {"kv_dtype": "bfloat16"},
        {"quantize": "none", "kv_dtype": "bfloat16"},
        {"activations": "bfloat16"},
    ],
)
def test_costs_of_other_types_are_guessed_with_a_warning(tmp_path, types, caplog):
    settings = check_settings({"costs_file": written(tmp_path, **types)})
    costs, names = costs_of(settings, SPECS, 10**10)
    assert names == frozenset() and costs.models == guessed()
    assert (
        "model=a" in caplog.text and " ".join(f"{k}={v}" for k, v in types.items()) in caplog.text
    )
    copy = (make_spec("x", 9_000_000_000),)
    assert costs_of(settings, copy, 10**11)[1] == frozenset()


@pytest.mark.parametrize(
    ("types", "chosen"),
    [
        ({"quantize": "none", "kv_dtype": "float32", "activations": "float32"}, {}),
        ({"quantize": "none", "kv_dtype": "float32"}, {"kv_dtype": "float32"}),
        ({"kv_dtype": "bfloat16"}, {"kv_dtype": "bfloat16"}),
        ({"activations": "bfloat16"}, {"activation_dtype": "bfloat16"}),
    ],
)
def test_costs_of_the_same_types_are_taken(tmp_path, types, chosen, caplog):
    settings = check_settings({"costs_file": written(tmp_path, **types), **chosen})
    assert costs_of(settings, SPECS, 10**10)[1] == {"a"}
    assert "guessed" not in caplog.text


def test_with_int8_weights_the_type_of_activations_is_all_the_same(tmp_path):
    path = written(tmp_path, quantize="int8", activations="bfloat16")
    settings = check_settings({"costs_file": path, "quantize": "int8"})
    specs = tuple(msgspec.structs.replace(spec, quantize="int8") for spec in SPECS)
    assert costs_of(settings, specs, 10**10)[1] == {"a"}


@pytest.mark.parametrize("text", [None, "{}", "nonsense"])
def test_a_file_without_costs_is_refused_by_name(tmp_path, text):
    path = tmp_path / "costs.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"costs\.json"):
        costs_of(check_settings({"costs_file": str(path)}), SPECS, 10**10)


@pytest.mark.parametrize("role", ["colocated", "prefill", "decode"])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_is_built_for_every_role(policy, role):
    counts = {f"{kind}_count": 0 for kind in ("colocated", "prefill", "decode")}
    if role == "colocated":
        counts["colocated_count"] = 1
    else:
        counts |= {"prefill_count": 1, "decode_count": 1}
    made = msgspec.structs.replace(launch(policy=policy, **counts), index=int(role == "decode"))
    learning = LearningCosts(*costs_of(made.settings, SPECS, 3 * 10**9))
    scheduler = build_scheduler(
        made, Residency({spec.id: spec.weight_bytes for spec in SPECS}, 3 * 10**9), learning
    )
    assert scheduler.role == role
    if role != "decode":
        scheduler.submit(make_request("r", "a"), 0.0)
        assert scheduler.next_load(0.0).model == "a"


def test_the_policies_are_those_of_the_settings():
    assert set(POLICIES) == set(get_args(get_type_hints(Settings)["policy"]))


@pytest.mark.parametrize(
    ("settings", "running"),
    [({}, 32), ({"max_batch": 3}, 6), ({"max_batch": 3, "max_running": 4}, 4)],
)
def test_as_many_run_as_the_settings_say(settings, running):
    chosen = launch(**settings)
    learning = LearningCosts(*costs_of(chosen.settings, SPECS, 10**10))
    residency = Residency({spec.id: spec.weight_bytes for spec in SPECS}, 10**10)
    assert build_scheduler(chosen, residency, learning)._limits.max_running == running


def test_a_null_engine_takes_as_long_as_the_file_says(tmp_path):
    path = tmp_path / "costs.json"
    cost = ModelCost(9, 1, 9, prefill=(0.5, 0.25, 1), decode=(0.125, 4, 8))
    costs = Costs(link_gb_per_s=7, device_memory_gb=80, models={"a": cost}, model_mix=("a",))
    path.write_bytes(msgspec.json.encode(costs))
    waited = []
    settings = check_settings({"device": "null", "costs_file": str(path)})
    engine = paced(NullEngine(SPECS, waited.append, 100.0, 100.0), settings, SPECS)
    for model in ("a", "b"):
        engine.load(Load(model))
    engine.submit(make_request("r", "a", prompt_token_ids=(1, 2, 3), max_tokens=9))
    engine.submit(make_request("s", "a", prompt_token_ids=(1,), max_tokens=9))
    engine.execute(Prefill("a", ("r",), max_tokens=2))
    engine.execute(Prefill("a", ("r", "s")))
    assert engine.execute(Decode("a", ("r", "s"))).took_s == 0.125 * (4 + 2) + 4 * 2 + 8
    assert waited == [
        2 / 7,  # its weights, as large as they are
        0.0,  # nobody has measured the other one
        0.5 * 2 + 0.25 * 4 + 1,
        0.5 * (1 + 1) + 0.25 * (9 - 4 + 1) + 1,
        0.125 * (4 + 2) + 4 * 2 + 8,
    ]


def test_a_null_engine_without_costs_keeps_its_pace():
    waited = []
    engine = paced(NullEngine(SPECS, waited.append, 0.5, 2.0), check_settings({}), SPECS)
    engine.load(Load("a"))
    assert waited == [2.0]
