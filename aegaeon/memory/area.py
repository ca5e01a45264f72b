"""A device's memory as the parts of an engine see it, whoever's memory that is."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from aegaeon._native import DeviceBytes


@dataclass(frozen=True, slots=True)
class Area:
    """Bytes that begin at `address`; `tensor` [bytes] uint8 are the same to torch, and keep them.

    `owner`: the device that they are on, where this processor does not write them itself.
    """

    tensor: Tensor
    owner: DeviceBytes | None = None

    @property
    def address(self) -> int:
        """Where it begins, as the device counts."""
        return self.tensor.data_ptr()

    def part(self, offset: int, size_bytes: int) -> Tensor:
        """Return some of its bytes, to be read and written by the device."""
        return self.tensor[offset : offset + size_bytes]

    def cut(self, offset: int, size_bytes: int) -> "Area":
        """Return a part of it as an area."""
        return Area(self.part(offset, size_bytes), self.owner)


class Pins(Protocol):
    """Page-locks memory of the host, so that a device copies from there at full speed."""

    def pin(self, address: int, size_bytes: int, /) -> bool:
        """Lock whole pages; False where the system refuses, which only costs speed."""

    def unpin(self, address: int, /) -> None:
        """Undo that, before the memory is unmapped and behind all copies from there."""
