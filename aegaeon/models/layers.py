"""The decoder that all families share, written on the device's operators."""

from dataclasses import dataclass

import torch
from torch import Tensor

from aegaeon.device.base import Device, StepBatch
from aegaeon.models.checkpoint import EMBEDDING, FINAL_NORM, HEAD
from aegaeon.models.config import ModelConfig
from aegaeon.models.rope import Rotary
from aegaeon.models.weights import WeightReader


@dataclass(frozen=True, slots=True)
class Linear:
    """A placed projection; weight [out, in], bias [out]."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. Projections that read the same input are one: fewer, larger products."""

    input_norm: Tensor  # [hidden]
    qkv: Linear  # [(heads + 2 * kv_heads) * head_dim, hidden]
    query_norm: Tensor | None  # [head_dim]
    key_norm: Tensor | None  # [head_dim]
    output: Linear  # [hidden, heads * head_dim]
    mlp_norm: Tensor  # [hidden]
    gate_up: Linear  # [2 * intermediate, hidden]
    down: Linear  # [hidden, intermediate]


class Decoder:
    """A model on a device. Owns its weights; keeps nothing between steps."""

    def __init__(self, config: ModelConfig, device: Device, reader: WeightReader) -> None:
        """Read and place all weights. Raises CheckpointError."""
        self.config = config
        self._device = device
        self._rotary = Rotary(config.rope, config.head_dim)
        self._embedding = reader.place(EMBEDDING)  # [vocab, hidden]
        self._layers = [read_layer(reader, f"model.layers.{i}.") for i in range(config.layers)]
        self._norm = reader.place(FINAL_NORM)
        # A tied head is read in the order of the embedding: packing it would hold it twice.
        tied = config.tie_word_embeddings
        self._head = self._embedding if tied else reader.place(HEAD, for_products=True)
        self.weight_bytes = reader.placed_bytes

    @torch.no_grad()
    def forward(self, batch: StepBatch) -> Tensor:
        """Append the rows' keys and values; return logits [len(logit_rows), vocab] float32."""
        device = self._device
        x = device.embed(batch.token_ids, self._embedding)
        angles = self._rotary.tables(batch.positions)
        for index, layer in enumerate(self._layers):
            normed = device.rms_norm(x, layer.input_norm, self.config.rms_norm_eps)
            x = x + self._attention(index, layer, normed, angles, batch)
            normed = device.rms_norm(x, layer.mlp_norm, self.config.rms_norm_eps)
            x = x + self._mlp(layer, normed)
        if len(batch.logit_rows) == 0:
            return x.new_empty((0, self.config.vocab_tokens))
        x = device.rms_norm(x[batch.logit_rows], self._norm, self.config.rms_norm_eps)
        return device.linear(x, self._head)

    @torch.no_grad()
    def prepare(self) -> None:
        """Use each shape of projection once: what a device finds out at the first use of one, it
        finds out before a request waits for it."""
        layer = self._layers[0]
        projections = (layer.qkv, layer.output, layer.gate_up, layer.down)
        for weight in (*(projection.weight for projection in projections), self._head):
            self._device.linear(torch.zeros(1, weight.shape[1]), weight)

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        batch: StepBatch,
    ) -> Tensor:
        device, config = self._device, self.config
        qkv = device.linear(x, layer.qkv.weight, layer.qkv.bias)
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
        cos, sin = angles
        device.append_kv(index, device.rotate(keys, cos, sin), values, batch)
        queries = device.rotate(queries, cos, sin)
        mixed = device.attend(index, queries, batch, config.head_dim**-0.5)
        return device.linear(mixed, layer.output.weight, layer.output.bias)

    def _mlp(self, layer: LayerWeights, x: Tensor) -> Tensor:
        device = self._device
        gate, up = device.linear(x, layer.gate_up.weight, layer.gate_up.bias).chunk(2, dim=-1)
        return device.linear(device.silu_mul(gate, up), layer.down.weight, layer.down.bias)


def read_layer(reader: WeightReader, prefix: str) -> LayerWeights:
    """Place the tensors whose names begin with `prefix`."""
    attention = prefix + "self_attn."
    return LayerWeights(
        input_norm=reader.place(prefix + "input_layernorm.weight"),
        qkv=read_linear(reader, *(f"{attention}{part}_proj" for part in "qkv")),
        query_norm=reader.place_if_stored(attention + "q_norm.weight"),
        key_norm=reader.place_if_stored(attention + "k_norm.weight"),
        output=read_linear(reader, attention + "o_proj"),
        mlp_norm=reader.place(prefix + "post_attention_layernorm.weight"),
        gate_up=read_linear(reader, prefix + "mlp.gate_proj", prefix + "mlp.up_proj"),
        down=read_linear(reader, prefix + "mlp.down_proj"),
    )


def read_linear(reader: WeightReader, *names: str) -> Linear:
    """Place the projections `names` as one, stacked along their outputs."""
    weight = reader.place(*(f"{name}.weight" for name in names), for_products=True)
    return Linear(weight, reader.place_if_stored(*(f"{name}.bias" for name in names)))
