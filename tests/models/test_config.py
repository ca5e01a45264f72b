"""config.json: what is accepted in which form, and what is refused with which words."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegaeon.errors import AegaeonError, CheckpointError, ModelNotFound, UnsupportedModel
from aegaeon.models.config import ModelConfig, parse_config, read_config
from tests.support.checkpoints import make_config

SCALED = {"factor": 4.0, "original_max_position_embeddings": 128}


def parse(family: str = "llama", **overrides: Any) -> ModelConfig:
    return parse_config(json.dumps(make_config(family, **overrides)).encode())


def test_both_spellings_of_rope_are_one() -> None:
    old = parse(rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=5e5)
    new = parse(
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}, rope_theta=None
    )
    assert old == new
    assert (new.rope.kind, new.rope.theta, new.rope.factor) == ("linear", 5e5, 2.0)


def test_yarn_widens_the_context() -> None:
    assert parse("qwen3", rope_scaling={"rope_type": "yarn", **SCALED}).context_tokens == 512
    long = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert parse("qwen3", rope_scaling=long).context_tokens == 2048


def test_an_architecture_is_known_by_its_type_where_no_class_is_named() -> None:
    assert parse("qwen2", architectures=None).architecture == "Qwen2ForCausalLM"


def test_families_differ_in_biases_and_norms() -> None:
    assert (parse("llama").qkv_bias, parse("llama").qk_norm) == (False, False)
    assert (parse("qwen2").qkv_bias, parse("qwen2").output_bias) == (True, False)
    assert parse("qwen3").qk_norm
    biased = parse("llama", attention_bias=True, mlp_bias=True)
    assert biased.qkv_bias and biased.output_bias and biased.mlp_bias


@pytest.mark.parametrize(
    ("overrides", "fact"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "LlamaForCausalLM, Qwen2ForCausalLM, Qwen3"),
        ({"architectures": None, "model_type": "mamba"}, "mamba"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope type 'longrope'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"head_dim": 15}, "head_dim is 15"),
        (
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
            "sliding window of 64",
        ),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 64,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            "sliding window of 64",
        ),
    ],
)
def test_what_is_not_built_is_refused(overrides: dict[str, Any], fact: str) -> None:
    with pytest.raises(UnsupportedModel, match=fact):
        parse("qwen3", **overrides)


def test_a_window_as_long_as_the_context_is_none() -> None:
    parse("qwen2", use_sliding_window=True, sliding_window=512, max_window_layers=0)


@pytest.mark.parametrize(
    "overrides",
    [
        {"hidden_size": None},
        {"vocab_size": "many"},
        {"num_hidden_layers": 0},
        {"num_key_value_heads": 3},
        {"rms_norm_eps": -1.0},
        {"rope_theta": 1.0},
        {"rope_scaling": {"rope_type": "linear"}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_slow": 1e-320}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 1e308}},
        {"rope_scaling": {"rope_type": "yarn\nline two", "factor": 2.0}},
        {"hidden_act": "silu" * 1000},
        {"architectures": ["One\nTwo"]},
        {"rope_scaling": {"rope_type": "llama3", **SCALED}},
        {
            "rope_scaling": {
                "rope_type": "llama3", **SCALED, "low_freq_factor": 2, "high_freq_factor": 2,
            }
        },
    ],
)  # fmt: skip
def test_a_wrong_configuration_is_an_error_of_one_line(overrides: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse(**overrides)
    assert "\n" not in str(caught.value)


def test_a_missing_configuration_is_a_missing_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        read_config(tmp_path)


def test_deep_nesting_is_no_crash() -> None:
    with pytest.raises(CheckpointError):
        parse_config(b'{"architectures":' + b"[" * 100_000)


@given(data=st.data())
def test_damaged_bytes_raise_only_our_errors(data: st.DataObject) -> None:
    text = bytearray(json.dumps(make_config("qwen3", rope_scaling=SCALED)).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    try:
        parse_config(bytes(text))
    except AegaeonError as error:
        assert "\n" not in str(error)
