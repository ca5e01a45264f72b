"""The decoder that all families share, written on the device's operators."""

from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from aegaeon.device.base import (
    AwaitStage,
    Device,
    Embedding,
    Operators,
    Projection,
    StepBatch,
    StepInputs,
)
from aegaeon.models.checkpoint import EMBEDDING, FINAL_NORM, HEAD, layer_prefix
from aegaeon.models.config import ModelConfig
from aegaeon.models.embedding_rows import EmbeddingRows
from aegaeon.models.rope import Rotary
from aegaeon.models.weights import PackedWeights

IDENTITY_BYTES = 16


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. Projections that read the same input are one: fewer, larger products."""

    input_norm: Tensor  # [hidden]
    qkv: Projection  # [(heads + 2 * kv_heads) * head_dim, hidden]
    query_norm: Tensor | None  # [head_dim]
    key_norm: Tensor | None  # [head_dim]
    output: Projection  # [hidden, heads * head_dim]
    mlp_norm: Tensor  # [hidden]
    gate_up: Projection  # [2 * intermediate, hidden]
    down: Projection  # [hidden, intermediate]


class Decoder:
    """A model on a device: views of its weights, which `weights` owns. Keeps nothing of a step.

    Making one reads no weight and looks at no layer.
    """

    def __init__(self, config: ModelConfig, device: Device, weights: PackedWeights) -> None:
        self.config = config
        self.weight_bytes = weights.plan.total_bytes
        self._device = device
        self._weights = weights
        self._rotary = Rotary(config.rope, config.head_dim)
        self._embedding = weights.matrix(EMBEDDING)  # [vocab, hidden]
        self._embedding_stage = weights.plan.tensors[EMBEDDING].stage
        self._rows = EmbeddingRows(weights.plan, weights.stages)
        self._layers: list[LayerWeights | None] = [None] * config.layers
        self._norm = weights.vector(FINAL_NORM)
        tied = config.tie_word_embeddings
        head = self._embedding if tied else weights.matrix(HEAD)
        self._head = Projection((head,), x_dtype=device.activation_dtype)
        self._runner = device.new_runner()
        self._identity = b""

    @property
    def identity(self) -> bytes:
        """Names the weights, what they are computed with and how: all that keys and values depend
        on but the tokens."""
        if not self._identity:
            device = f"{self.config} {self._device.name} {self._device.activation_dtype}"
            content = self._weights.plan.digest() + device.encode()
            self._identity = blake2b(content, digest_size=IDENTITY_BYTES).digest()
        return self._identity

    def prepare(self) -> None:
        """Do what the first step would have to before it begins: milliseconds, and no weight need
        be in. Whoever brings the weights in has the time."""
        self._runner.prepare(self._step, self.config.hidden_size, self.config.head_dim)

    @torch.no_grad()
    def forward(self, batch: StepBatch) -> Tensor:
        """Append the rows' keys and values; return logits [len(logit_rows), vocab] float32.

        Waits for each stage of the weights before its first use; for that of the embedding only
        where its rows are not to be had before.
        """
        embedding, angles = self._embed(batch.token_ids), self._rotary.tables(batch.positions)
        await_stage = self._weights.stages.await_stage
        return self._runner.run_tokens(self._step, embedding, angles, batch, await_stage)

    def _step(self, device: Operators, inputs: StepInputs, await_stage: AwaitStage) -> Tensor:
        """The decoder of every family; see `Step`."""
        x, batch = inputs.x, inputs.batch
        for index in range(self.config.layers):
            await_stage(index)
            layer = self._layer(index)
            mixed = self._attention(device, index, x, inputs)
            x = device.linear(mixed, layer.output, residual=x)
            x = device.linear(self._gated(device, layer, x), layer.down, residual=x)
        if len(batch.logit_rows) == 0:
            return x.new_empty((0, self.config.vocab_tokens))
        await_stage(self.config.layers)
        x = device.rms_norm(x, self._norm, self.config.rms_norm_eps, rows=batch.logit_rows)
        return device.linear(x, self._head)

    def _embed(self, token_ids: Tensor) -> Embedding:
        """Return where the ids' rows of the embedding are to be had."""
        stage, stages = self._embedding_stage, self._weights.stages
        gathered = None if stages.is_in(stage) else self._rows.gather(token_ids)
        if gathered is not None:
            return Embedding(*gathered, is_in_host=True)
        stages.await_stage(stage)
        return Embedding(token_ids, self._embedding)

    def _layer(self, index: int) -> LayerWeights:
        layer = self._layers[index]
        if layer is None:
            layer = self._layers[index] = view_layer(
                self._weights, layer_prefix(index), self._device.activation_dtype
            )
        return layer

    def _attention(self, device: Operators, index: int, x: Tensor, inputs: StepInputs) -> Tensor:
        """Return what the heads see, [rows, heads * head_dim]."""
        layer, config = self._layer(index), self.config
        normed = device.rms_norm(x, layer.input_norm, config.rms_norm_eps)
        qkv = device.linear(normed, layer.qkv)
        qkv = qkv.view(len(x), config.heads + 2 * config.kv_heads, config.head_dim)
        keys_end = config.heads + config.kv_heads
        queries, keys, values = (
            qkv[:, : config.heads],
            qkv[:, config.heads : keys_end],
            qkv[:, keys_end:],
        )
        if layer.query_norm is not None and layer.key_norm is not None:
            queries = device.rms_norm(queries, layer.query_norm, config.rms_norm_eps)
            keys = device.rms_norm(keys, layer.key_norm, config.rms_norm_eps)
        keys = device.rotate(keys, inputs.cos, inputs.sin)
        device.append_kv(index, keys, values, inputs.batch)
        queries = device.rotate(queries, inputs.cos, inputs.sin)
        return device.attend(index, queries, inputs.batch, config.head_dim**-0.5)

    def _gated(self, device: Operators, layer: LayerWeights, x: Tensor) -> Tensor:
        """Return the inner activations of the MLP, [rows, intermediate]."""
        normed = device.rms_norm(x, layer.mlp_norm, self.config.rms_norm_eps)
        return device.gated(normed, layer.gate_up)


def view_layer(weights: PackedWeights, prefix: str, x_dtype: torch.dtype) -> LayerWeights:
    """Return the tensors whose names begin with `prefix`; see Projection about `x_dtype`."""
    attention, mlp = prefix + "self_attn.", prefix + "mlp."

    def projection(*names: str) -> Projection:
        return view_projection(weights, x_dtype, *names)

    return LayerWeights(
        input_norm=weights.vector(prefix + "input_layernorm.weight"),
        qkv=projection(*(f"{attention}{part}_proj" for part in "qkv")),
        query_norm=view_vector(weights, attention + "q_norm.weight"),
        key_norm=view_vector(weights, attention + "k_norm.weight"),
        output=projection(attention + "o_proj"),
        mlp_norm=weights.vector(prefix + "post_attention_layernorm.weight"),
        gate_up=projection(mlp + "gate_proj", mlp + "up_proj"),
        down=projection(mlp + "down_proj"),
    )


def view_vector(weights: PackedWeights, name: str) -> Tensor | None:
    """Return the vector, or None where the model has none of this name."""
    return weights.vector(name) if weights.has(name) else None


def view_projection(weights: PackedWeights, x_dtype: torch.dtype, *names: str) -> Projection:
    """Return the projections `names` as one, stacked along their outputs."""
    biases = [f"{name}.bias" for name in names if weights.has(f"{name}.bias")]
    return Projection(
        tuple(weights.matrix(f"{name}.weight") for name in names),
        tuple(weights.vector(bias) for bias in biases),
        x_dtype,
    )
