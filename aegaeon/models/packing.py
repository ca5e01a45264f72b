"""A load plan -> where each tensor lies in the packed model, and what reads it there. No torch.

Matrices lie in tiles of 32 outputs, in the type of their files or as int8 with a scale for every 64
inputs, so that operators compute in place; norms and biases are float32. For a device whose
products are not ours, matrices are row by row, as in their files. Stages are in the order of need,
each a contiguous range: layer i is stage i, the final norm and the head follow. The embedding, of
which a step needs a few rows, is part of that last stage where it is the head, else a stage behind
it.
"""

import hashlib
import math
import os
from typing import Literal

import msgspec

from aegaeon.models import checkpoint
from aegaeon.models.checkpoint import LoadPlan, tensor_shapes
from aegaeon.models.config import ModelConfig
from aegaeon.models.safetensors import ELEMENT_BYTES, StoredTensor, version_of
from aegaeon.types import Quantize

# Part of the digest: another layout must not be taken for this one.
LAYOUT_VERSION = 3
ALIGNMENT_BYTES = 64
TILE_OUTPUTS = 32
GROUP_INPUTS = 64

Layout = Literal["rows", "tiles"]
LAYOUT_CODES: dict[Layout, int] = {"rows": 0, "tiles": 1}
QUANTIZED_TILES = 2
# What becomes of an element on its way, by (type in the file, type in memory). What becomes int8 is
# rounded as the float32 that it stands for.
CONVERSIONS = {("BF16", "F32"): 1, ("F16", "F32"): 2, ("BF16", "I8"): 1, ("F16", "I8"): 2}
# Of matrices, by setting; None: that of the file.
MATRIX_TYPES: dict[Quantize, str | None] = {"none": None, "int8": "I8"}

# (path, bytes, mtime_ns, inode)
PlannedFile = tuple[str, int, int, int]
# (file, file_offset, data_bytes, rows, row_bytes, element_bytes, layout, dest_offset, stage,
# convert): data_bytes, row_bytes and element_bytes are those of the file.
ReadJob = tuple[PlannedFile, int, int, int, int, int, int, int, int, int]


class PackedTensor(msgspec.Struct, frozen=True):
    """A tensor's place: `data_bytes` at `offset` of the packed model, elements of type `dtype`.

    Layout "rows" is `shape` row by row; "tiles" is [ceil(out / 32)][in][32], zero beyond `out`, for
    a `shape` of (out, in), where elements of "BF16" are pairs of inputs. Tiles of "I8" are those of
    csrc/ops/ops.h.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: Layout
    offset: int
    data_bytes: int
    stage: int
    source: StoredTensor

    def job(self, file: PlannedFile) -> ReadJob:
        """Return what a reader needs to bring the tensor in from `file`, its source as planned."""
        rows = self.shape[0] if self.layout == "tiles" else 1
        source = self.source
        is_paired = self.layout == "tiles" and self.dtype == "BF16"
        return (
            file,
            source.offset,
            source.data_bytes,
            rows,
            source.data_bytes // rows,
            2 * ELEMENT_BYTES["BF16"] if is_paired else ELEMENT_BYTES[source.dtype],
            QUANTIZED_TILES if self.dtype == "I8" else LAYOUT_CODES[self.layout],
            self.offset,
            self.stage,
            CONVERSIONS.get((source.dtype, self.dtype), 0),
        )


class PackPlan(msgspec.Struct, frozen=True):
    """The packed model: its tensors by name, in order of offset and stage."""

    load_plan: LoadPlan
    tensors: dict[str, PackedTensor]
    stage_ends: tuple[int, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of the packed model."""
        return self.stage_ends[-1]

    @property
    def stages(self) -> int:
        """Layers + 1, and one more where the embedding is not the head."""
        return len(self.stage_ends)

    def jobs(self) -> list[ReadJob]:
        """Return what brings all tensors in, in the order of stages and offsets."""
        files = {path: (path, *version) for path, version in self.load_plan.files.items()}
        return [tensor.job(files[tensor.source.path]) for tensor in self.tensors.values()]

    def digest(self) -> bytes:
        """Return 32 bytes that name this content: the layout, the files as planned, tensors."""
        files = [
            (os.path.abspath(path), *version)  # noqa: PTH100
            for path, version in sorted(self.load_plan.files.items())
        ]
        known = msgspec.msgpack.encode((LAYOUT_VERSION, files, list(self.tensors.values())))
        return hashlib.blake2b(known, digest_size=32).digest()

    def is_current(self) -> bool:
        """Whether the files are still as planned. Raises CheckpointError when one is gone."""
        return all(version_of(path) == version for path, version in self.load_plan.files.items())


def plan_pack(
    load_plan: LoadPlan, quantize: Quantize = "none", layout: Layout = "tiles"
) -> PackPlan:
    """Return the places of all tensors that the model of `load_plan` uses, matrices as `quantize`
    and `layout` say: rows are for devices whose products are not ours, and never int8."""
    assert layout == "tiles" or quantize == "none"
    tensors: dict[str, PackedTensor] = {}
    stages = {name: _stage(name, load_plan.config) for name, _ in tensor_shapes(load_plan.config)}
    stage_ends = [0] * (max(stages.values()) + 1)
    offset = 0
    for name, stage in sorted(stages.items(), key=lambda item: item[1]):
        tensor = _place(load_plan.tensors[name], (offset, stage), MATRIX_TYPES[quantize], layout)
        tensors[name] = tensor
        offset += -(-tensor.data_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        stage_ends[stage] = offset
    return PackPlan(load_plan, tensors, tuple(stage_ends))


def _stage(name: str, config: ModelConfig) -> int:
    match name:
        case checkpoint.EMBEDDING:
            return config.layers if config.tie_word_embeddings else config.layers + 1
        case checkpoint.FINAL_NORM | checkpoint.HEAD:
            return config.layers
        case _:
            return int(name.split(".", 3)[2])


def _place(
    source: StoredTensor, place: tuple[int, int], matrix_type: str | None, layout: Layout
) -> PackedTensor:
    is_matrix = len(source.shape) == 2
    dtype = (matrix_type or source.dtype) if is_matrix else "F32"
    if dtype == "BF16" and layout == "tiles" and source.shape[1] % 2:
        dtype = "F32"  # exactly: a pair would be torn
    offset, stage = place
    return PackedTensor(
        name=source.name,
        shape=source.shape,
        dtype=dtype,
        layout=layout if is_matrix else "rows",
        offset=offset,
        data_bytes=_data_bytes(source.shape, dtype, layout),
        stage=stage,
        source=source,
    )


def _data_bytes(shape: tuple[int, ...], dtype: str, layout: Layout) -> int:
    if len(shape) == 1 or layout == "rows":
        return math.prod(shape) * ELEMENT_BYTES[dtype]
    outputs, inputs = shape
    tiles = -(-outputs // TILE_OUTPUTS)
    if dtype == "I8":  # groups' scales, and pairs of inputs
        return tiles * 2 * TILE_OUTPUTS * (-(-inputs // GROUP_INPUTS) + -(-inputs // 2))
    return tiles * TILE_OUTPUTS * inputs * ELEMENT_BYTES[dtype]
