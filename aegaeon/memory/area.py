"""A device's memory as the parts of an engine see it, whoever's memory that is."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from aegaeon._native import DeviceBytes

log = logging.getLogger(__name__)


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

    def pin(
        self,
        address: int,
        size_bytes: int,
        is_read_only: bool,
        is_wanted: Callable[[], bool] | None,
        /,
    ) -> str:
        """Lock whole pages; return why not where the system refuses, which only costs speed.

        `is_read_only`: they are mapped so. `is_wanted` is asked now and then: False ends it. Raises
        DeviceLost.
        """

    def unpin(self, address: int, /) -> None:
        """Undo that, before the memory is unmapped and behind all copies from there."""


class Locks:
    """What is locked by `pins` for a device, and what the log is told of it. For any thread."""

    def __init__(self, pins: Pins) -> None:
        self._pins = pins
        self._has_warned = False

    def lock(
        self,
        what: str,
        place: tuple[int, int],
        is_read_only: bool = False,
        is_wanted: Callable[[], bool] | None = None,
    ) -> bool:
        """Lock `place`, address and bytes; say whether that was done. Raises DeviceLost."""
        began_s = time.monotonic()
        refusal = self._pins.pin(*place, is_read_only, is_wanted)
        took_s = time.monotonic() - began_s
        size_gb = place[1] / 1e9
        if not refusal:
            log.info("locked what=%s gb=%.3f took_s=%.3f", what, size_gb, took_s)
        elif is_wanted is not None and not is_wanted():
            log.info("not locked, not wanted any more what=%s took_s=%.3f", what, took_s)
        else:
            # What is refused once is refused for every model: nobody reads it ten times.
            level = logging.DEBUG if self._has_warned else logging.WARNING
            self._has_warned = True
            log.log(
                level,
                "%s (%.3f GB) cannot be locked in memory: %s. Copies from there go by way of a "
                "stage, at a fraction of the link's speed",
                *(what, size_gb, refusal),
            )
        return not refusal

    def unlock(self, address: int) -> None:
        """Undo `lock`, before the memory is unmapped and behind all copies from there."""
        self._pins.unpin(address)
