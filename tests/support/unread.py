"""Models of published sizes, of which no weight is there: for what is known before any is."""

import json
from types import SimpleNamespace

import torch
from torch import Tensor

from aegaeon.device.packed import Matrix
from aegaeon.models.checkpoint import tensor_shapes
from aegaeon.models.config import ModelConfig, parse_config
from aegaeon.models.stages import AllIn
from tests.support.checkpoints import make_config

# Hidden, heads, KV heads, head_dim, intermediate: as published, and odd ones.
SIZES = [
    *((1024, 16, 8, 128, 3072), (2048, 32, 8, 64, 8192), (4096, 32, 8, 128, 12288)),
    *((2560, 32, 8, 128, 9728), (896, 14, 2, 64, 4864), (5120, 64, 8, 128, 25600)),
    *((4096, 32, 32, 128, 11008), (1024, 4, 1, 256, 256), (512, 8, 8, 64, 4000)),
]


def config_of(family: str, sizes: tuple[int, ...]) -> ModelConfig:
    """Return a configuration of `sizes`, of four layers."""
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    changes = dict(zip((*names, "intermediate_size"), sizes, strict=True))
    return parse_config(json.dumps(make_config(family, num_hidden_layers=4, **changes)).encode())


class Unread:
    """Weights of any size, of which nobody reads any."""

    def __init__(self, config: ModelConfig) -> None:
        self.stages = AllIn()
        self.shapes = dict(tensor_shapes(config))
        tensors = {name: SimpleNamespace(stage=0) for name in self.shapes}
        load_plan = SimpleNamespace(config=config)
        self.plan = SimpleNamespace(total_bytes=1, tensors=tensors, load_plan=load_plan)

    def matrix(self, name: str) -> Matrix:
        return Matrix(None, 64, *self.shapes[name], torch.bfloat16)

    def vector(self, name: str) -> Tensor:
        return torch.zeros(self.shapes[name])

    def has(self, name: str) -> bool:
        return name in self.shapes
