"""Opens a ModelEngine on a CUDA device: one allocation up front, copies by its own copy engines."""

from collections.abc import Callable

from torch import Tensor

from aegaeon import _native
from aegaeon._native import CudaDevice, CudaMemory
from aegaeon.config import Settings
from aegaeon.device.cuda import CudaOperators
from aegaeon.device.products import view_of
from aegaeon.engine.engine import ModelEngine
from aegaeon.engine.kv_peers import Peers
from aegaeon.engine.own_memory import OwnMemory, open_on
from aegaeon.engine.regions import Regions
from aegaeon.engine.shared import DTYPES, Compute, kv_shapes
from aegaeon.errors import BudgetTooSmall, ConfigError, DeviceError, UnsupportedModel
from aegaeon.memory.area import Area
from aegaeon.memory.budget import CUDA_CHUNK_BYTES, gb
from aegaeon.memory.cuda_room import room_bytes
from aegaeon.models.config import read_config
from aegaeon.types import ModelSpec

HEAD_DIMS = (64, 96, 128, 256)  # of csrc/ops/cuda/attend.cu
View = Callable[[CudaMemory], Tensor]


def open_cuda_engine(
    settings: Settings, specs: tuple[ModelSpec, ...], regions: Regions
) -> ModelEngine:
    """Return the engine. Raises DeviceError, ConfigError, UnsupportedModel, and what `open_on`
    raises."""
    assert settings.cuda_number is not None
    if any(spec.quantize != "none" for spec in specs):
        raise ConfigError("int8 weights are for the CPU; serve on CUDA with --quantize none")
    for model, shape in kv_shapes(specs, DTYPES[settings.stored_kv]).items():
        if shape.head_dim not in HEAD_DIMS:
            raise UnsupportedModel(
                f"{model} has heads of {shape.head_dim}; on CUDA they have 64, 96, 128 or 256: "
                "serve it with --device cpu"
            )
    device = _native.CudaDevice(settings.cuda_number)
    room = room_bytes((read_config(spec.path) for spec in specs), settings.max_batch)
    compute = Compute(lambda *_: CudaOperators(device, size=room), layout="rows", pins=device)
    return open_on(on_device(device, view_of, compute), settings, specs, regions)


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
            f"cuda:{device.number} has {gb(device.free_bytes)} free of {gb(device.total_bytes)}, "
            f"{gb(size_bytes)} are asked for ({error}); lower --device-memory-gb, or stop what "
            "else uses the device"
        ) from None
