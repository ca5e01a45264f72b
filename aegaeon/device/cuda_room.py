"""Memory of a CUDA device that steps use, and nothing outlives: what is not weights, KV or torch's
own."""

from __future__ import annotations  # a build without CUDA lacks the names

from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakSet

from torch import Tensor

from aegaeon import _native
from aegaeon.device.products import Products
from aegaeon.memory.cuda_room import RoomBytes
from aegaeon.memory.workspace import FLOAT_BYTES, MAX_PASS_ROWS

UNBOUNDED = 1 << 62


class Viewer(Protocol):
    """Whoever keeps views of rooms between steps."""

    def let_go(self) -> None:
        """Drop them: they would keep the memory that a room is about to give back."""


@dataclass(slots=True)
class Room:
    """One piece, made once; made anew where more is needed than was foreseen."""

    device: _native.CudaDevice
    products: Products
    viewers: WeakSet[Viewer] = field(default_factory=WeakSet)
    _memory: _native.CudaMemory | None = None
    _view: Tensor | None = None

    @property
    def view(self) -> Tensor:
        """All of it, [bytes] uint8."""
        assert self._view is not None, "a room is reserved before it is used"
        return self._view

    @property
    def size_bytes(self) -> int:
        """What has been reserved; from any thread."""
        memory = self._memory
        return 0 if memory is None else memory.size_bytes

    def reserve(self, size_bytes: int) -> int:
        """Return where as many bytes are, on a device whose streams may still use what was there.
        No device has to hold the old and the new at once. Raises DeviceError."""
        if self._memory is None or self._memory.size_bytes < size_bytes:
            self.device.synchronize()
            for viewer in self.viewers:
                viewer.let_go()
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
        # Of slots and results; joined and told on the thread that computes.
        self.viewers: WeakSet[Viewer] = WeakSet()
        self.slots = Room(device, products, self.viewers)  # what operators make
        self.result = Room(device, products, self.viewers)  # logits
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

    @property
    def total_bytes(self) -> int:
        """Of all, as they are by now; from any thread."""
        every = self.slots, self.result, self.upload, self.splits, self.draws
        return sum(room.size_bytes for room in every)
