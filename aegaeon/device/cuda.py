"""A CUDA device: our kernels (csrc/ops/cuda) and torch's products, on one stream.

Weights are row by row, as in their files. Only the stream of the native device computes, so that
copies know what to start behind. Tokens are the CPU's for the same logits.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from aegaeon import _native
from aegaeon.device.attention import paged_rows
from aegaeon.device.base import (
    AwaitStage,
    Change,
    Device,
    Draw,
    Projection,
    RowLogProbs,
    Step,
    StepBatch,
    StepInputs,
    StepRunner,
)
from aegaeon.device.draws import draw_operands, log_probabilities_on_host, sample_on_host
from aegaeon.device.packed import TYPE_CODES, Matrix
from aegaeon.errors import DeviceError
from aegaeon.memory.kv import KvShape, KvView


def view_of(memory: _native.CudaMemory) -> Tensor:
    """Return `memory`, which it keeps, as torch sees it: [bytes] uint8. Raises DeviceError for a
    torch without CUDA."""
    check_torch()
    return torch.as_tensor(_ArrayInterface(memory), device=f"cuda:{memory.number}")


class CudaOperators(Device):
    """Computes on `device`; activations are float32, and rounded to the type of the weights that
    they are multiplied with."""

    activation_dtype = torch.bfloat16

    def __init__(self, device: _native.CudaDevice, place: torch.device | None = None) -> None:
        """`place` is where torch has what the device has; given only where the host stands in for a
        device. Raises DeviceError for a torch without CUDA."""
        self.name = f"cuda:{device.number}"
        self._device = device
        self._place = torch.device(self.name) if place is None else place
        self.on_stream: Callable[[], AbstractContextManager[object]] = nullcontext
        if self._place.type == "cuda":
            check_torch()
            external = torch.cuda.ExternalStream
            stream = external(device.stream, device=self._place)  # type: ignore[no-untyped-call]
            self.on_stream = lambda: torch.cuda.stream(stream)
        self._host = _native.ThreadPool(1)
        self._tables: _Tables | None = None
        self._heads: dict[KvShape, int] = {}  # of queries, as the last attention over it had

    def new_runner(self) -> StepRunner:
        return _OnStream(self)

    def bring(self, x: Tensor) -> Tensor:
        """Return `x` on the device."""
        return x.to(self._place)

    def embed(self, token_ids: Tensor, table: Matrix) -> Tensor:
        with self.on_stream():
            ids, rows = self.bring(token_ids.contiguous()), self.bring(_rows_of(table))
            out = torch.empty((len(ids), table.in_features), device=self._place)
            operand = rows.data_ptr(), table.out_features, TYPE_CODES[table.dtype]
            _native.cuda_embed(self._device, ids.data_ptr(), out.shape, operand, out.data_ptr())
            return out

    def linear(self, x: Tensor, projection: Projection, residual: Tensor | None = None) -> Tensor:
        out = x.new_empty((len(x), projection.out_features))
        first = 0
        for at, part in enumerate(projection.parts):
            columns = out[:, first : first + part.out_features]
            columns.copy_(x.to(part.dtype) @ _rows_of(part).T)
            if projection.biases:
                columns += projection.biases[at]
            first += part.out_features
        return out if residual is None else out.add_(residual)

    def gated(self, x: Tensor, projection: Projection) -> Tensor:
        gate, up = self.linear(x, projection).chunk(2, dim=1)
        out = torch.empty(gate.shape, device=self._place)
        _native.cuda_silu_mul(self._device, _operand(gate), _operand(up), out.shape, out.data_ptr())
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, rows: Tensor | None = None) -> Tensor:
        x = x if rows is None else x[rows]
        out = torch.empty(x.shape, device=self._place)
        heads = x.shape[1] if x.dim() > 2 else 1
        shape = (len(x), heads, x.shape[-1])
        weight_address = weight.data_ptr()
        _native.cuda_rms_norm(self._device, _operand(x), shape, weight_address, eps, out.data_ptr())
        return out

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        out = torch.empty(x.shape, device=self._place)
        shape = (x.shape[0], x.shape[1], x.shape[2])
        angles = (cos.data_ptr(), sin.data_ptr())
        _native.cuda_rotate(self._device, _operand(x), shape, angles, out.data_ptr())
        return out

    def append_kv(self, layer: int, keys: Tensor, values: Tensor, batch: StepBatch) -> None:
        shape = batch.kv.shape
        tables = self._tables_for(batch.kv, self._heads.get(shape, shape.kv_heads))
        operands = _operand(keys), _operand(values)
        tables.native.append_kv(self._device, layer, len(keys), *operands)

    def attend(self, layer: int, queries: Tensor, batch: StepBatch, scale: float) -> Tensor:
        queries = queries.contiguous()
        rows, heads, head_dim = queries.shape
        self._heads[batch.kv.shape] = heads
        out = torch.empty((rows, heads * head_dim), device=self._place)
        tables = self._tables_for(batch.kv, heads)
        given = (queries.data_ptr(), rows)
        tables.native.attend(self._device, layer, given, scale, out.data_ptr())
        return out

    def sample(
        self, logits: Tensor, draws: Sequence[Draw], changes: Sequence[Change | None] = ()
    ) -> list[int | None]:
        drawn = self._sample(logits, draws)
        changed = [row for row, change in enumerate(changes) if change is not None]
        if changed:
            # Few rows have changes, and the host makes the same tokens of the same logits.
            with self.on_stream():
                rows = logits[changed].cpu()
            own = [draws[row] for row in changed], [changes[row] for row in changed]
            for row, token in zip(changed, sample_on_host(self._host, rows, *own), strict=True):
                drawn[row] = token
        return drawn

    def select(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        # Not on torch's own stream, which waits for nobody.
        with self.on_stream():
            return super().select(logits, rows)

    def log_probabilities(
        self, logits: Tensor, chosen: Sequence[int], best: int
    ) -> list[RowLogProbs]:
        with self.on_stream():
            rows = logits.cpu()
        return log_probabilities_on_host(self._host, rows, chosen, best)

    def _sample(self, logits: Tensor, draws: Sequence[Draw]) -> list[int | None]:
        with self.on_stream():
            logits = logits.contiguous()
            shape = (logits.shape[0], logits.shape[1])
            native = _native.CudaDraws(draw_operands(draws), shape)
            tokens = torch.empty(len(draws), dtype=torch.int64, device=self._place)
            if draws:
                drawn_by = torch.frombuffer(native, dtype=torch.uint8).to(self._place)
                workspace = torch.empty(
                    native.workspace_bytes, dtype=torch.uint8, device=self._place
                )
                places = drawn_by.data_ptr(), workspace.data_ptr()
                native.sample(self._device, logits.data_ptr(), places, tokens.data_ptr())
            drawn: list[int] = tokens.tolist()
        # Whatever was launched has ended then, also of a pass that has no logits.
        self._device.synchronize()
        return [None if token < 0 else token for token in drawn]

    def _tables_for(self, kv: KvView, heads: int) -> "_Tables":
        tables = self._tables
        if tables is None or tables.kv is not kv or tables.heads != heads:
            tables = self._tables = _Tables(kv, heads, self._place)
        return tables


class _Tables:
    """The tables of a pass on the device; made once for all of its layers."""

    def __init__(self, kv: KvView, heads: int, place: torch.device) -> None:
        self.kv = kv
        self.heads = heads
        self.native = _native.CudaTables(paged_rows(kv), heads)
        self._words = torch.frombuffer(self.native, dtype=torch.int32).to(place)
        self._workspace = torch.empty(max(1, self.native.workspace_floats), device=place)
        self.native.place(self._words.data_ptr(), self._workspace.data_ptr())


class _OnStream(StepRunner):
    """One operator after another on the device's stream. Copies of what a step that failed still
    computes with start behind it."""

    def __init__(self, device: CudaOperators) -> None:
        self._device = device

    def run(self, step: Step, inputs: StepInputs, await_stage: AwaitStage) -> Tensor:
        device, batch = self._device, inputs.batch
        with device.on_stream():
            brought = StepInputs(
                device.bring(inputs.x),
                device.bring(inputs.cos),
                device.bring(inputs.sin),
                StepBatch(
                    batch.token_ids, batch.positions, device.bring(batch.logit_rows), batch.kv
                ),
            )
            return step(device, brought, await_stage)


class _ArrayInterface:
    """What torch makes a tensor of without a copy; the tensor keeps it, and so the memory."""

    def __init__(self, memory: _native.CudaMemory) -> None:
        self._memory = memory
        self.__cuda_array_interface__ = {
            "shape": (memory.size_bytes,),
            "typestr": "|u1",
            "data": (memory.address, False),
            "strides": None,
            "version": 3,
        }


def check_torch() -> None:
    """Raise DeviceError for a torch without CUDA."""
    if not torch.cuda.is_available():
        raise DeviceError(
            f"torch {torch.__version__} here cannot use CUDA; install a torch built for CUDA "
            "(https://pytorch.org), or serve with --device cpu"
        )


def _rows_of(matrix: Matrix) -> Tensor:
    """Return the matrix, [out, in] of its type, as a view of what owns it."""
    owner = matrix.owner
    assert isinstance(owner, Tensor), "on CUDA weights lie in tensors"
    if owner.dtype == matrix.dtype:
        return owner.view(matrix.out_features, matrix.in_features)
    first = matrix.address - owner.data_ptr()
    count = matrix.out_features * matrix.in_features * matrix.dtype.itemsize
    flat = owner[first : first + count].view(matrix.dtype)
    return flat.view(matrix.out_features, matrix.in_features)


def _operand(x: Tensor) -> tuple[int, int]:
    """Return address and row stride of x [rows, ...], whose rows lie in one piece each."""
    assert x.stride(-1) == 1 and (x.dim() == 2 or x.stride(1) == x.shape[2])
    return x.data_ptr(), x.stride(0)
