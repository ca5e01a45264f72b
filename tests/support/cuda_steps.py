"""Models whose steps run on a CUDA device that this host stands in for, without an engine."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from aegaeon import _native
from aegaeon.device.base import Device
from aegaeon.device.cuda import CudaOperators
from aegaeon.memory.kv import KvShape
from aegaeon.models.checkpoint import plan_load
from aegaeon.models.layers import Decoder
from aegaeon.models.packing import plan_pack
from aegaeon.models.weights import PackedWeights, read_weights
from tests.support.checkpoints import VOCAB_TOKENS, make_checkpoint
from tests.support.cuda_products import HostProducts
from tests.support.cuda_stand_in import cuda_device, put_in_place
from tests.support.paged import PagedSequences

# Of heads that the kernels have.
WIDTHS = {"hidden_size": 128, "num_attention_heads": 2, "head_dim": 64, "num_key_value_heads": 1}
Part = tuple[int, int, int]  # sequence, start, rows


@contextmanager
def on_stand_in(order: int, monkeypatch: pytest.MonkeyPatch, seed: int = 1) -> Iterator[ModuleType]:
    """Have all that _native has of CUDA on the stand-in and the emulation."""
    with cuda_device(order, seed) as module, monkeypatch.context() as patches:
        put_in_place(module, patches)
        yield module


def operators(module: ModuleType, tile_rows: int = 4) -> CudaOperators:
    """Return what computes on the stand-in."""
    return CudaOperators(_native.CudaDevice(0), HostProducts(module, tile_rows))


def row_weights(
    directory: Path, family: str, dtype: torch.dtype, **changes: object
) -> PackedWeights:
    """Return a small model's weights row by row, as a device has them."""
    made = make_checkpoint(directory, family, dtype=dtype, **(WIDTHS | changes))
    plan = plan_pack(plan_load(made), layout="rows")
    return PackedWeights(read_weights(plan).memory, plan)


class SteppedModel:
    """A decoder and sequences of its own, whose token at a position is a function of both."""

    def __init__(self, device: Device, weights: PackedWeights, lengths: Sequence[int]) -> None:
        config = weights.plan.load_plan.config
        self.decoder = Decoder(config, device, weights)
        shape = KvShape(config.layers, config.kv_heads, config.head_dim)
        self.sequences = PagedSequences(shape, list(lengths))

    def step(self, *parts: Part, wanted: str = "last") -> Tensor:
        """Return the logits of each part's last row, of all rows, or of none; on the device."""
        batch = self.sequences.batch(list(parts))
        ids = [
            (37 * at + 11 * sequence) % VOCAB_TOKENS
            for sequence, start, rows in parts
            for at in range(start, start + rows)
        ]
        ends = torch.tensor([rows for _, _, rows in parts]).cumsum(0)
        rows = {"last": ends - 1, "all": torch.arange(len(ids)), "none": ends[:0]}[wanted]
        return self.decoder.forward(replace(batch, token_ids=torch.tensor(ids), logit_rows=rows))
