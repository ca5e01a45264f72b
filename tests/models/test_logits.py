"""Every family and variant against transformers, in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from aegaeon.device.base import StepBatch
from aegaeon.device.cpu import CpuDevice
from aegaeon.device.packed import pack, unpack
from aegaeon.memory.kv import KvPool, KvRows, KvShape, blocks_for
from aegaeon.models.config import read_config
from aegaeon.models.layers import Decoder
from aegaeon.models.registry import load_model
from aegaeon.types import Quantize
from tests.support.checkpoints import make_checkpoint
from tests.support.dense_device import DenseDevice, dense_batch
from tests.support.smollm2 import smollm2_directory

TOLERANCE = 1e-4
INT8_TOLERANCE = 5e-3  # activations are rounded to 16 bits in each product
SMOLLM2_PROMPTS = (
    "The capital of France is",
    "def add(a, b):\n",
    "Zwölf Boxkämpfer jagen",
    "<|im_start|>user\nName three rivers.<|im_end|>\n<|im_start|>assistant\n",
)
PROMPT = [7, 260, 44, 3, 3, 199, 301, 12, 90, 91, 92, 93, 5, 370, 0, 1, 2, 250]

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama without grouped queries": ("llama", {"num_key_value_heads": None}),
    "llama with one kv head": ("llama", {"num_key_value_heads": 1}),
    "llama untied": ("llama", {"tie_word_embeddings": False}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with its own head_dim": ("llama", {"head_dim": 24}),
    "llama without head_dim": ("llama", {"head_dim": None}),
    "llama with llama3 rope": ("llama", {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0}),
    "llama with rope_parameters": (
        "llama",
        {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5000.0}, "rope_theta": None},
    ),
    "llama with linear rope": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.5}}),
    "qwen2": ("qwen2", {}),
    "qwen2 untied": ("qwen2", {"tie_word_embeddings": False, "rms_norm_eps": 1e-5}),
    "qwen2 with yarn": ("qwen2", {"rope_scaling": YARN, "rope_theta": 1000000.0}),
    "qwen2 with an idle window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3 untied with biases": (
        "qwen3",
        {"tie_word_embeddings": False, "attention_bias": True},
    ),
    "qwen3 with wide heads": ("qwen3", {"head_dim": 32}),
    "qwen3 with its default head_dim": ("qwen3", {}),
    "qwen3 with tuned yarn": (
        "qwen3",
        {
            "rope_scaling": {
                **YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False,
                "mscale": 0.7, "mscale_all_dim": 0.4,
            }
        },
    ),
    "qwen3 with yarn's attention factor": (
        "qwen3",
        {"rope_scaling": {**YARN, "attention_factor": 1.3}},
    ),
}  # fmt: skip


def reference_logits(directory: Path, token_ids: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    family, overrides = VARIANTS[name]
    if name == "qwen3 with its default head_dim":
        directory = make_default_head_dim(tmp_path)
    else:
        directory = make_checkpoint(tmp_path, family, **overrides)
    prompt = PROMPT * 8
    decoder = load_model(directory, DenseDevice())
    ours = decoder.forward(dense_batch(prompt))
    assert ours.dtype == torch.float32
    assert (ours - reference_logits(directory, prompt)).abs().max() < TOLERANCE


def make_default_head_dim(directory: Path) -> Path:
    """A Qwen3 whose config.json leaves head_dim out: 128, whatever the hidden size."""
    make_checkpoint(directory, "qwen3", head_dim=128)
    path = directory / "config.json"
    path.write_text(path.read_text().replace('"head_dim": 128,', ""))
    return directory


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_shards_hold_the_same_model(family: str, tmp_path: Path) -> None:
    whole = load_model(make_checkpoint(tmp_path / "whole", family), DenseDevice())
    sharded = load_model(make_checkpoint(tmp_path / "shards", family, shards=3), DenseDevice())
    batch = dense_batch(PROMPT)
    assert torch.equal(whole.forward(batch), sharded.forward(batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_compute_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "qwen2", dtype=dtype)
    ours = load_model(directory, DenseDevice()).forward(dense_batch(PROMPT))
    assert (ours - reference_logits(directory, PROMPT)).abs().max() < TOLERANCE


def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "llama")
    whole = load_model(directory, DenseDevice()).forward(dense_batch(PROMPT))
    pieces = load_model(directory, DenseDevice())
    pieces.forward(dense_batch(PROMPT[:5]))
    rest = pieces.forward(dense_batch(PROMPT[5:], start=5))
    torch.testing.assert_close(rest, whole[5:], atol=1e-5, rtol=0)


def test_no_logits_are_made_where_none_are_wanted(tmp_path: Path) -> None:
    batch = dense_batch(PROMPT)
    wanting_none = type(batch)(batch.token_ids, batch.positions, batch.logit_rows[:0], batch.kv)
    decoder = load_model(make_checkpoint(tmp_path, "llama"), DenseDevice())
    assert decoder.forward(wanting_none).shape == (0, decoder.config.vocab_tokens)


def test_smollm2_continues_as_under_transformers() -> None:
    """64 greedy tokens of prompts that decode together; each must be the reference's own choice
    behind those before it."""
    directory = smollm2_directory()
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids for text in SMOLLM2_PROMPTS]
    decoder = load_model(directory, CpuDevice())
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    _, logits = continue_greedily(decoder, prompts, 4)
    assert torch.equal(continue_greedily(decoder, prompts[2:3], 4)[1], logits[2:3])
    together, _ = continue_greedily(decoder, prompts, 64)
    for prompt, continued in zip(prompts, together, strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + continued[:-1]])).logits[0]
        assert continued == logits[len(prompt) - 1 :].argmax(-1).tolist()


@pytest.mark.parametrize("name", ["llama with biases", "qwen2", "qwen3 untied with biases"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_logits_are_those_of_the_weights_that_int8_stands_for(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    family, overrides = VARIANTS[name]
    directory = make_checkpoint(tmp_path, family, dtype=dtype, hidden_size=200, **overrides)
    config, prompt = read_config(directory), PROMPT * 3
    decoder = load_model(directory, CpuDevice(2), quantize="int8")
    pool = KvPool(16 << 20, [KvShape(config.layers, config.kv_heads, config.head_dim)])
    ours = forward_alone(decoder, pool, prompt)
    file = directory / "model.safetensors"
    weights = {
        name: unpack(pack(weight, torch.int8)) if weight.dim() == 2 else weight
        for name, weight in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})
    assert (ours - reference_logits(directory, prompt)).abs().max() < INT8_TOLERANCE


def forward_alone(decoder: Decoder, pool: KvPool, prompt: list[int]) -> torch.Tensor:
    """Return the logits of every row of `prompt`."""
    config = decoder.config
    shape = KvShape(config.layers, config.kv_heads, config.head_dim)
    blocks = tuple(pool.allocate(shape, blocks_for(len(prompt))))
    batch = dense_batch(prompt)
    rows = [KvRows(0, len(prompt), 0, blocks)]
    view = pool.view(shape, rows)
    return decoder.forward(StepBatch(batch.token_ids, batch.positions, batch.logit_rows, view))


def test_smollm2_with_activations_of_bfloat16_is_near_the_reference() -> None:
    """Nearer than the reference with activations and sums of bfloat16 is."""
    directory = smollm2_directory()
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    prompt = tokenizer.encode(SMOLLM2_PROMPTS[3]).ids
    decoder = load_model(directory, CpuDevice(2, torch.bfloat16))
    config = decoder.config
    pool = KvPool(16 << 20, [KvShape(config.layers, config.kv_heads, config.head_dim)])
    ours = forward_alone(decoder, pool, prompt)
    exact = reference_logits(directory, prompt)
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
        rounded = model(torch.tensor([prompt])).logits[0].float()
    assert 1e-3 < (ours - exact).norm() < (rounded - exact).norm()
    assert (ours - exact).norm() < 2e-2 * exact.norm()


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_logits_have_the_same_bits_alone_and_together(
    family: str, quantize: Quantize, tmp_path: Path
) -> None:
    directory = make_checkpoint(tmp_path, family, hidden_size=96, dtype=torch.bfloat16)
    decoder = load_model(directory, CpuDevice(1, torch.bfloat16), quantize=quantize)
    prompts = [PROMPT[:1], PROMPT * 15, PROMPT[3:9], PROMPT * 2, PROMPT[1:]]
    _, together = continue_greedily(decoder, prompts, 3)
    for i, prompt in enumerate(prompts):
        assert torch.equal(continue_greedily(decoder, [prompt], 3)[1], together[i : i + 1]), i


def continue_greedily(
    decoder: Decoder, prompts: list[list[int]], count: int
) -> tuple[list[list[int]], torch.Tensor]:
    """Return `count` tokens behind each prompt and the logits [prompts, vocab] of the last."""
    config = decoder.config
    shape = KvShape(config.layers, config.kv_heads, config.head_dim)
    lengths = [len(prompt) + count for prompt in prompts]
    pool = KvPool(256 << 20, [shape])
    blocks = [tuple(pool.allocate(shape, blocks_for(length))) for length in lengths]
    steps, starts, made = prompts, [0] * len(prompts), [list[int]() for _ in prompts]
    for _ in range(count):
        rows, first = [], 0
        for step, start, owned in zip(steps, starts, blocks, strict=True):
            rows.append(KvRows(first, len(step), start, owned))
            first += len(step)
        positions = [range(part.start, part.tokens) for part in rows]
        batch = StepBatch(
            token_ids=torch.tensor([token for step in steps for token in step]),
            positions=torch.tensor([position for part in positions for position in part]),
            logit_rows=torch.tensor([part.first_row + part.rows - 1 for part in rows]),
            kv=pool.view(shape, rows),
        )
        logits = decoder.forward(batch)
        tokens = logits.argmax(-1).tolist()
        starts, steps = [part.tokens for part in rows], [[token] for token in tokens]
        for line, token in zip(made, tokens, strict=True):
            line.append(token)
    return made, logits
