"""Memory of a CUDA device that steps use, and nothing outlives: what is not weights, KV or torch's
own."""

from dataclasses import dataclass

from torch import Tensor

from aegaeon import _native
from aegaeon.device.products import Products
from aegaeon.memory.cuda_room import RoomBytes
from aegaeon.memory.workspace import FLOAT_BYTES, MAX_PASS_ROWS

UNBOUNDED = 1 << 62


@dataclass(slots=True)
class Room:
    """One piece, made once; made anew where more is needed than was foreseen."""

    device: _native.CudaDevice
    products: Products
    _memory: _native.CudaMemory | None = None
    _view: Tensor | None = None

    @property
    def view(self) -> Tensor:
        """All of it, [bytes] uint8."""
        assert self._view is not None, "a room is reserved before it is used"
        return self._view

    def reserve(self, size_bytes: int) -> int:
        """Return where as many bytes are, on a device whose streams may still use what was there.
        Raises DeviceError."""
        if self._memory is None or self._memory.size_bytes < size_bytes:
            self.device.synchronize()
            self._memory = self._view = None
            self._memory = self.device.allocate(max(size_bytes, 1))
            self._view = self.products.view(self._memory)
        return self._memory.address


class Rooms:
    """What steps of all models share."""

    def __init__(
        self, device: _native.CudaDevice, products: Products, size: RoomBytes | None = None
    ) -> None:
        """Reserve `size`. Raises DeviceError."""
        self.slots = Room(device, products)  # what operators make
        self.result = Room(device, products)  # logits
        self.upload = Room(device, products)
        self.splits = Room(device, products)  # of attention
        self.draws = Room(device, products)
        # Floats that splits may take, and rows of decodes whose launches are recorded.
        self.most_floats = UNBOUNDED if size is None else size.splits // FLOAT_BYTES
        self.graph_rows = MAX_PASS_ROWS if size is None else size.rows
        if size is not None:
            self.slots.reserve(size.slots)
            self.result.reserve(size.result)
            self.upload.reserve(size.upload)
            self.splits.reserve(size.splits)
            self.draws.reserve(size.draws)
