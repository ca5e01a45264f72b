"""Opens a ModelEngine on a CUDA device: one allocation up front, copies by its own copy engines."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from aegaeon import _native
from aegaeon._native import CudaDevice, CudaMemory
from aegaeon.config import Settings
from aegaeon.device.cuda import CudaOperators
from aegaeon.device.packed import TYPE_CODES
from aegaeon.device.products import view_of
from aegaeon.engine.engine import ModelEngine
from aegaeon.engine.kv_peers import Peers
from aegaeon.engine.own_memory import OwnMemory, open_on
from aegaeon.engine.regions import Regions
from aegaeon.engine.shared import DTYPES, Compute, kv_shapes
from aegaeon.errors import (
    BudgetTooSmall,
    ConfigError,
    DeviceError,
    DeviceLost,
    UnsupportedModel,
)
from aegaeon.memory.area import Area
from aegaeon.memory.budget import CUDA_CHUNK_BYTES, Budgets, gb
from aegaeon.memory.cuda_room import room_bytes
from aegaeon.memory.kv import KvShape
from aegaeon.models.config import ModelConfig, read_config
from aegaeon.types import ModelId, ModelSpec

HEAD_DIMS = (64, 96, 128, 256)  # of csrc/ops/cuda/attend.cu
# For which kernels are compiled (cmake/cuda.cmake): asynchronous copies, products of bfloat16.
LEAST_CAPABILITY = (8, 0)
View = Callable[[CudaMemory], Tensor]


def open_cuda_engine(
    settings: Settings, specs: tuple[ModelSpec, ...], regions: Regions
) -> ModelEngine:
    """Return the engine. Raises DeviceError, ConfigError, UnsupportedModel, and what `open_on`
    raises."""
    assert settings.cuda_number is not None
    shapes = check_models(settings, specs)
    device = _native.CudaDevice(settings.cuda_number)
    check_device(device, shapes)
    configs = {spec.id: read_config(spec.path) for spec in specs}
    compute = Opening(device, settings, configs).compute()
    return open_on(on_device(device, view_of, compute), settings, specs, regions)


@dataclass(slots=True)
class Opening:
    """What computes on `device` for models of these `configs`, to which others may come."""

    device: CudaDevice
    settings: Settings
    configs: dict[ModelId, ModelConfig]
    _operators: CudaOperators | None = None

    def compute(self) -> Compute:
        return Compute(
            lambda settings, budgets, _: self.open(settings, budgets),
            layout="rows",
            pins=self.device,
            check=self.check,
        )

    def open(self, settings: Settings, budgets: Budgets) -> CudaOperators:
        """Raises BudgetTooSmall, and DeviceError."""
        room = room_bytes(self.configs.values(), settings.max_batch)
        self._operators = CudaOperators(self.device, size=room)
        warm_up(self.device, self._operators, budgets.device_bytes)
        return self._operators

    def check(self, settings: Settings, specs: tuple[ModelSpec, ...]) -> None:
        """Raise what keeps the device from computing models that come while it serves, whose steps
        may need more memory than those it was opened for: they get it when they first run."""
        check_device(self.device, check_models(settings, specs))
        configs = self.configs | {spec.id: read_config(spec.path) for spec in specs}
        assert self._operators is not None, "models come to what is open"
        rooms = self._operators.compute.rooms
        room = room_bytes(configs.values(), settings.max_batch)
        # Attention makes do with the splits that there are.
        has_bytes = rooms.total_bytes - rooms.splits.size_bytes
        more_bytes = room.total_bytes - room.splits - has_bytes
        free_bytes = self.device.free_bytes
        if more_bytes > free_bytes:
            names = ", ".join(spec.id for spec in specs)
            raise BudgetTooSmall(
                f"steps of {names} take {gb(more_bytes)} more of cuda:{self.device.number} than "
                f"those of the models that it was opened for, {gb(free_bytes)} are free; start the "
                "server with it among its models, or with a lower --device-memory-gb"
            )
        self.configs = configs


def warm_up(device: CudaDevice, operators: CudaOperators, needed_bytes: int) -> None:
    """Have steps take all that they take of `device` before the one allocation, of `needed_bytes`,
    which would leave them none: the vendor's products allocate when they are first asked for.
    Raises BudgetTooSmall with the numbers, and DeviceLost."""
    try:
        with ThreadPoolExecutor(1, "warm up") as thread:
            thread.submit(operators.warm_up).result()
    except DeviceLost:
        raise
    except (DeviceError, RuntimeError) as error:
        device.check()
        raise BudgetTooSmall(
            f"{_free_of(device)}, in which products cannot begin ({error}); stop what else uses "
            "the device, or lower --max-batch"
        ) from None
    if device.free_bytes < needed_bytes:
        raise BudgetTooSmall(
            f"{_free_of(device)} beside what steps take, {gb(needed_bytes)} are asked for weights, "
            "keys and values; lower --device-memory-gb, or stop what else uses the device"
        )


def check_models(settings: Settings, specs: tuple[ModelSpec, ...]) -> Mapping[ModelId, KvShape]:
    """Return what a token of each model keeps. Raises ConfigError and UnsupportedModel for what no
    kernel computes."""
    if any(spec.quantize != "none" for spec in specs):
        raise ConfigError("int8 weights are for the CPU; serve on CUDA with --quantize none")
    shapes = kv_shapes(specs, DTYPES[settings.stored_kv])
    for model, shape in shapes.items():
        if shape.head_dim not in HEAD_DIMS:
            raise UnsupportedModel(
                f"{model} has heads of {shape.head_dim}; on CUDA they have 64, 96, 128 or 256: "
                "serve it with --device cpu"
            )
    return shapes


def check_device(device: CudaDevice, shapes: Mapping[ModelId, KvShape]) -> None:
    """Raise DeviceError where `device` is too old for the kernels, or has less shared memory than
    those of some model's heads and type of keys and values take."""
    major, minor = device.capability
    if (major, minor) < LEAST_CAPABILITY:
        raise DeviceError(
            f"cuda:{device.number} has compute capability {major}.{minor}, the kernels need "
            "8.0 (an A100 or newer): serve with --device cpu"
        )
    has_bytes = device.block_shared_bytes
    for model, shape in shapes.items():
        need_bytes = _shared_bytes(shape, shape.dtype)
        if need_bytes <= has_bytes:
            continue
        is_half_enough = _shared_bytes(shape, torch.bfloat16) <= has_bytes
        remedy = "--kv-dtype bfloat16" if is_half_enough else "--device cpu"
        raise DeviceError(
            f"attention of {model}, with keys and values of {shape.dtype} and heads of "
            f"{shape.head_dim}, takes {need_bytes} bytes of shared memory in a block, "
            f"cuda:{device.number} gives {has_bytes}: serve with {remedy}"
        )


def _shared_bytes(shape: KvShape, dtype: torch.dtype) -> int:
    return _native.cuda_attend_shared_bytes(shape.head_dim, TYPE_CODES[dtype])


def on_device(device: CudaDevice, view: View, compute: Compute) -> OwnMemory:
    """Return the memory and the link of `device`; `view` is how torch sees the memory."""
    allocated: list[CudaMemory] = []  # the one

    def allocate(size_bytes: int) -> Area:
        allocated[:] = [_allocate(device, size_bytes)]
        return Area(view(allocated[0]), allocated[0])

    return OwnMemory(
        allocate=allocate,
        open_link=lambda: device.copy_engine(CUDA_CHUNK_BYTES),
        compute=compute,
        open_peers=lambda: Peers(device, allocated[0]),
    )


def _allocate(device: CudaDevice, size_bytes: int) -> CudaMemory:
    try:
        return device.allocate(size_bytes)
    except DeviceError as error:
        raise BudgetTooSmall(
            f"{_free_of(device)}, {gb(size_bytes)} are asked for ({error}); lower "
            "--device-memory-gb, or stop what else uses the device"
        ) from None


def _free_of(device: CudaDevice) -> str:
    return f"cuda:{device.number} has {gb(device.free_bytes)} free of {gb(device.total_bytes)}"
