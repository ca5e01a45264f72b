"""A CUDA device: our kernels (csrc/ops/cuda) and torch's products, on one stream.

Weights are row by row, as in their files. Only the stream of the native device computes, so that
copies know what to start behind. Tokens are the CPU's for the same logits.
"""

from __future__ import annotations  # a build without CUDA lacks the names

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from aegaeon import _native
from aegaeon.device.base import Change, Device, Draw, RowLogProbs, StepRunner
from aegaeon.device.cuda_graphs import Graphs
from aegaeon.device.cuda_room import Rooms
from aegaeon.device.cuda_step import CudaCompute, CudaRunner
from aegaeon.device.draws import draw_operands, log_probabilities_on_host, sample_on_host
from aegaeon.device.products import Products, TorchProducts
from aegaeon.memory.cuda_room import RoomBytes

# Of what goes to a device and comes back with a step, at first.
EXCHANGE_BYTES = 1 << 20
WEIGHT_TYPES = torch.bfloat16, torch.float16, torch.float32
# Of the products by which the device is warmed up: inputs and outputs, and bytes of each operand.
WARM_UP_WIDTH = 256
WARM_UP_BYTES = WARM_UP_WIDTH * WARM_UP_WIDTH * torch.float32.itemsize


class CudaOperators(Device):
    """Computes on `device`; activations are float32, and rounded to the type of the weights that
    they are multiplied with."""

    activation_dtype = torch.bfloat16

    def __init__(
        self,
        device: _native.CudaDevice,
        products: Products | None = None,
        size: RoomBytes | None = None,
    ) -> None:
        """`products`: who multiplies, torch unless the host stands in for a device. `size`: what
        is reserved beside weights and KV, for as long as this lives. Raises DeviceError for a torch
        without CUDA, and where the device has not as much."""
        self.name = f"cuda:{device.number}"
        products = TorchProducts(device.number) if products is None else products
        rooms = Rooms(device, products, size)
        exchange = _native.CudaExchange(device, max(EXCHANGE_BYTES, size.upload if size else 0))
        self.graphs = Graphs(device)
        self.compute = CudaCompute(device, products, rooms, exchange, self.graphs)
        self._host = _native.ThreadPool(1)

    def warm_up(self) -> None:
        """Have whoever multiplies take now what it takes of the device: a handle, and memory for
        each stream. Raises DeviceError, and RuntimeError as torch does.

        Torch has a handle for each thread, and gives that of one that has ended to the next: so
        call it on a thread that ends before another one computes.
        """
        compute = self.compute
        memory = compute.products.view(compute.device.allocate(3 * WARM_UP_BYTES))
        self.graphs.warm_up(lambda stream: self._multiply(memory, stream))

    def new_runner(self) -> StepRunner:
        return CudaRunner(self.compute)

    def check(self) -> None:
        self.compute.device.check()

    def sample(
        self, logits: Tensor, draws: Sequence[Draw], changes: Sequence[Change | None] = ()
    ) -> list[int | None]:
        drawn = self._sample(logits, draws)
        changed = [row for row, change in enumerate(changes) if change is not None]
        if changed:
            # Few rows have changes, and the host makes the same tokens of the same logits.
            rows = self._on_host(self.select(logits, changed))
            own = [draws[row] for row in changed], [changes[row] for row in changed]
            for row, token in zip(changed, sample_on_host(self._host, rows, *own), strict=True):
                drawn[row] = token
        return drawn

    def log_probabilities(
        self, logits: Tensor, chosen: Sequence[int], best: int
    ) -> list[RowLogProbs]:
        return log_probabilities_on_host(self._host, self._on_host(logits), chosen, best)

    def select(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        with self._behind_steps():
            return logits[torch.tensor(rows, dtype=torch.int64, device=logits.device)]

    def _multiply(self, memory: Tensor, stream: int) -> None:
        """Launch a product with each type of weights, all of `memory`, which holds zeros."""
        products = self.compute.products
        with products.on_stream(stream):
            for dtype in WEIGHT_TYPES:
                rows = products.tile_rows(dtype)
                x = _rows_at(memory, 0, dtype, rows)
                weight = _rows_at(memory, WARM_UP_BYTES, dtype, WARM_UP_WIDTH)
                out = _rows_at(memory, 2 * WARM_UP_BYTES, torch.float32, rows)
                products.multiply(x, weight, out)

    def _on_host(self, logits: Tensor) -> Tensor:
        with self._behind_steps():
            return logits.cpu()

    def _behind_steps(self) -> AbstractContextManager[object]:
        """Return a context in which torch sees what steps have made, and steps what torch makes."""
        self.compute.device.synchronize()
        return self.compute.products.on_stream(self.compute.device.stream)

    def _sample(self, logits: Tensor, draws: Sequence[Draw]) -> list[int | None]:
        compute = self.compute
        # Whatever was launched has ended then, also of a pass that has no logits.
        if not draws:
            compute.device.synchronize()
            return []
        assert logits.is_contiguous(), "a step's logits are, and so is what is selected of them"
        native = _native.CudaDraws(draw_operands(draws), (logits.shape[0], logits.shape[1]))
        room = compute.rooms.draws.reserve(native.room_bytes)
        drawn = native.sample(compute.device, compute.exchange, logits.data_ptr(), room)
        return [None if token < 0 else token for token in drawn]


def _rows_at(memory: Tensor, begin: int, dtype: torch.dtype, rows: int) -> Tensor:
    flat = memory[begin : begin + rows * WARM_UP_WIDTH * dtype.itemsize]
    return flat.view(dtype).view(rows, WARM_UP_WIDTH)
