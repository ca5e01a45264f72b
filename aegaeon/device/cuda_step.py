"""Runs a model's step on a CUDA device: recorded once, then launched natively between products,
after one upload of all that it needs; a decode of few shapes as a CUDA graph."""

from __future__ import annotations  # a build without CUDA lacks the names

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aegaeon import _native
from aegaeon.device.attention import paged_rows
from aegaeon.device.base import (
    Angles,
    AwaitStage,
    Embedding,
    Projection,
    Step,
    StepBatch,
    StepInputs,
    StepRunner,
)
from aegaeon.device.cuda_graphs import Graphs
from aegaeon.device.cuda_room import Rooms
from aegaeon.device.packed import Matrix
from aegaeon.device.products import HALF_TILE_ROWS, Products
from aegaeon.device.recorder import RecordedStep, record
from aegaeon.memory.workspace import FLOAT_BYTES, MAX_PASS_ROWS, SPLIT_TOKENS

Given = tuple[int, tuple[int, int, int], int, int]  # as _native.CudaPass takes a pass
Table = tuple[int, int, int, int]
Place = tuple[bool, int, int]  # in the result's room, else the slots'; bytes of a row; columns


@dataclass(frozen=True, slots=True)
class CudaCompute:
    """What steps of all models share: one of them at a time."""

    device: _native.CudaDevice
    products: Products
    rooms: Rooms
    exchange: _native.CudaExchange
    graphs: Graphs


@dataclass(slots=True)
class _Factor:
    """A matrix of a product, and the tiles of its operand and of its sums, made at their first
    use."""

    weight: Tensor  # [outputs, inputs]
    begin: int  # of its operand, bytes of a row of all slots before it
    out: Place
    column: int
    is_of_outputs: bool
    tiles: list[tuple[Tensor, Tensor]]


Described = tuple[tuple[int, int, int], Place, tuple[int, int], bool]  # by CudaStepPlan.products


def _factors_of(projection: Projection, described: list[Described]) -> list[_Factor]:
    """Return as few and as large ones as can be: parts that lie one behind the other are one."""
    found: list[tuple[Matrix, Described]] = []
    for part, one in zip(projection.parts, described, strict=True):
        before = found[-1] if found else None
        if before is not None and before[1][0] == one[0] and _is_behind(before[0], part):
            outputs = before[0].out_features + part.out_features
            found[-1] = replace(before[0], out_features=outputs), before[1]
        else:
            found.append((part, one))
    return [
        _Factor(_rows_of(part), x[0], out, columns[0], is_of_outputs, [])
        for part, (x, out, columns, is_of_outputs) in found
    ]


def _is_behind(first: Matrix, second: Matrix) -> bool:
    end = first.address + first.out_features * first.in_features * first.dtype.itemsize
    is_alike = first.owner is second.owner and first.dtype == second.dtype
    return is_alike and second.address == end


class CudaRunner(StepRunner):
    """Of one model. Copies of what a step that failed still computes with start behind it."""

    def __init__(self, compute: CudaCompute) -> None:
        self._compute = compute
        self._recorded: RecordedStep[_native.CudaStepPlan] | None = None
        self._factors: list[list[_Factor]] = []
        self._identity = b""
        self._places: tuple[int, int, int] = (0, 0, 0)  # that the tiles are of
        self._stages = 0  # that are in, from the first on; none goes while the model is here

    def prepare(self, step: Step, hidden: int, head_dim: int) -> None:
        recorded = record(step, hidden, head_dim, _native.CudaStepPlan())
        projections = [one for one in recorded.weights if isinstance(one, Projection)]
        self._factors = [
            _factors_of(projection, described)
            for projection, described in zip(projections, recorded.plan.products, strict=True)
        ]
        self._recorded = recorded
        self._identity = hashlib.sha256(recorded.plan.identity).digest()

    def run(self, step: Step, inputs: StepInputs, await_stage: AwaitStage) -> Tensor:
        """`inputs` are the host's or the device's."""
        x = inputs.x.cpu().contiguous()
        table = Matrix(x, x.data_ptr(), len(x), x.shape[1], x.dtype)
        embedding = Embedding(torch.arange(len(x)), table, is_in_host=True)
        angles = inputs.cos.cpu().contiguous(), inputs.sin.cpu().contiguous()
        return self.run_tokens(step, embedding, angles, inputs.batch, await_stage)

    def run_tokens(
        self,
        step: Step,
        embedding: Embedding,
        angles: Angles,
        batch: StepBatch,
        await_stage: AwaitStage,
    ) -> Tensor:
        if self._recorded is None:
            self.prepare(step, embedding.table.in_features, angles[0].shape[1])
        assert self._recorded is not None
        plan, compute = self._recorded.plan, self._compute
        rooms = compute.rooms
        bucket = _bucket_of(batch, embedding, rooms.graph_rows)
        given = _native.CudaPass(
            plan,
            paged_rows(batch.kv),
            *_operands(embedding, angles, batch),
            (*bucket, rooms.most_floats),
        )
        rows = max(len(embedding.token_ids), bucket[0])
        counts = rows, max(len(batch.logit_rows), bucket[0])
        self._place(given, counts)
        given.send(compute.exchange)
        is_whole = self._stages >= plan.stages_of(plan.operators - 1)
        if bucket[0] > 0 and is_whole:
            key = self._identity, given.identity
            compute.graphs.run(key, lambda stream: self._launch(given, counts, stream, await_stage))
        else:
            self._launch(given, counts, compute.device.stream, await_stage)
        features, outputs = self._recorded.result_features, len(batch.logit_rows)
        result = rooms.result.view[: outputs * features * FLOAT_BYTES]
        return result.view(torch.float32).view(outputs, features)

    def _place(self, given: _native.CudaPass, counts: tuple[int, int]) -> None:
        """Have room for the pass, and tell it where; `counts` are its rows and outputs."""
        assert self._recorded is not None
        rooms, tile = self._compute.rooms, HALF_TILE_ROWS
        slot_rows = max(MAX_PASS_ROWS, *(_up(count, tile) for count in counts))
        outputs = _up(counts[1], tile)
        slots = rooms.slots.reserve(slot_rows * self._recorded.plan.row_bytes)
        result = rooms.result.reserve(outputs * self._recorded.result_features * FLOAT_BYTES)
        upload = rooms.upload.reserve(given.upload_bytes)
        splits = rooms.splits.reserve(given.workspace_bytes)
        given.place((slots, slot_rows), result, upload, splits)
        if self._places != (slots, slot_rows, result):
            self.let_go()
            self._places = slots, slot_rows, result
            rooms.viewers.add(self)

    def let_go(self) -> None:
        """Drop all views of rooms."""
        self._places = (0, 0, 0)
        for factor in (factor for factors in self._factors for factor in factors):
            factor.tiles.clear()

    def _launch(
        self,
        given: _native.CudaPass,
        counts: tuple[int, int],
        stream: int,
        await_stage: AwaitStage,
    ) -> None:
        assert self._recorded is not None
        plan, at = self._recorded.plan, 0
        with self._compute.products.on_stream(stream):
            while (at := given.run(stream, at, self._stages)) < plan.operators:
                needed = plan.stages_of(at)
                if needed > self._stages:
                    await_stage(needed - 1)
                    self._stages = needed
                product = plan.product_of(at)
                if product is not None:
                    self._multiply(self._factors[product], counts)
                    at += 1

    def _multiply(self, factors: list[_Factor], counts: tuple[int, int]) -> None:
        products = self._compute.products
        for factor in factors:
            tile = products.tile_rows(factor.weight.dtype)
            wanted = -(-counts[factor.is_of_outputs] // tile)
            while len(factor.tiles) < wanted:
                factor.tiles.append(self._tile(factor, len(factor.tiles) * tile, tile))
            for x, out in factor.tiles[:wanted]:
                products.multiply(x, factor.weight, out)

    def _tile(self, factor: _Factor, first: int, rows: int) -> tuple[Tensor, Tensor]:
        """Return rows `first` .. of what the weight is multiplied with, and of what is made."""
        rooms, slot_rows = self._compute.rooms, self._places[1]
        outputs, inputs = factor.weight.shape
        is_result, begin, columns = factor.out
        x = _cut(
            rooms.slots.view, factor.begin * slot_rows, factor.weight.dtype, inputs, first + rows
        )
        home = rooms.result if is_result else rooms.slots
        out = _cut(
            home.view, 0 if is_result else begin * slot_rows, torch.float32, columns, first + rows
        )
        return x[first:], out[first:, factor.column : factor.column + outputs]


def _cut(view: Tensor, begin: int, dtype: torch.dtype, columns: int, rows: int) -> Tensor:
    """Return [rows, columns] of bytes from `begin` on."""
    end = begin + rows * columns * dtype.itemsize
    return view[begin:end].view(dtype).view(rows, columns)


def _operands(embedding: Embedding, angles: Angles, batch: StepBatch) -> tuple[Given, Table]:
    """Return what a pass is given, of tensors that live until it has been sent."""
    table, ids = embedding.table, embedding.token_ids
    host_bytes = table.out_features * table.in_features * table.dtype.itemsize
    cos, sin = angles
    assert all(one.is_contiguous() for one in (ids, cos, sin, batch.logit_rows))
    given = (
        len(ids),
        (ids.data_ptr(), cos.data_ptr(), sin.data_ptr()),
        len(batch.logit_rows),
        batch.logit_rows.data_ptr(),
    )
    return given, (*table.operand, host_bytes if embedding.is_in_host else 0)


def _bucket_of(batch: StepBatch, embedding: Embedding, most: int) -> tuple[int, int]:
    """Return rows and splits, powers of two, of the recorded step that runs this decode: a row of
    each sequence, `most` of them, wanted of all. (0, 0) for what is launched as it is."""
    rows, sequences = len(embedding.token_ids), batch.kv.sequences
    is_decode = rows == len(sequences) == len(batch.logit_rows) and not embedding.is_in_host
    if not is_decode or rows > most or any(part.rows != 1 for part in sequences):
        return 0, 0
    splits = -(-max(part.tokens for part in sequences) // SPLIT_TOKENS)
    return _power_of_two(rows), _power_of_two(splits)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


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
