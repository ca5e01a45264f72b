"""Copies between places in memory, beside compute (csrc/copy)."""

from collections.abc import Sequence
from typing import final

@final
class CopyEngine:
    """Copies between places in memory, on threads of its own, beside everything else.

    A copy is cut into chunks; before each, the engine looks for what is most urgent. It is for all
    threads of the process that made it: in a forked child, all but `close` raises CopyError.
    """

    def __init__(
        self,
        threads: int = 1,
        chunk_bytes: int = 1 << 20,
        link_bytes_per_s: int = 0,
        is_duplex: bool = True,
    ) -> None:
        """Start `threads` (1 to 64), which sleep while there is nothing to do.

        With `link_bytes_per_s`, bytes come in at the rate of such a device link and not before,
        one chunk behind the other; if `is_duplex`, at this rate in either direction. A chunk is
        how long an urgent copy may have to wait. Raises ValueError, CopyError (no more threads).
        """

    def submit(
        self,
        segments: Sequence[tuple[int, int, int]],
        priority: int = 1,
        after: Sequence[CopyTicket] = (),
        is_outward: bool = False,
    ) -> CopyTicket:
        """Have `segments`, (to address, from address, bytes) each, copied in order.

        The memory is the caller's: it must last until the ticket is done, has failed, or `cancel`
        has returned. Priority 0 goes first, 2 last, equals in the order they were submitted; on
        several threads, neighbours overlap in time. So a copy that writes what another one reads
        or writes must name it in `after`: it starts when all of those have ended, whether done or
        not, and lends them its priority. Segments of one copy may overlap, and one may overlap
        itself if it moves to a lower address: they are then copied one after the other.

        Raises ValueError, CopyQueueFull above 4096 open tickets, CopyError when closed, DeviceLost.
        """

    def close(self) -> None:
        """Cancel all that is open and stop the threads; memory is untouched after. Idempotent."""

    @property
    def open_tickets(self) -> int:
        """Tickets that have not ended, or wait for their turn to pass on their order."""

@final
class CopyTicket:
    """One copy. It may be dropped, and the copy is made nevertheless."""

    @property
    def is_done(self) -> bool:
        """Whether all bytes are in."""

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` or the engine's `close` came before the end."""

    @property
    def has_failed(self) -> bool:
        """Whether copying raised an error, which `failure` tells."""

    @property
    def failure(self) -> str:
        """Why it failed, or nothing."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all segments."""

    @property
    def progress_bytes(self) -> int:
        """How many bytes are in, counted through the segments without a gap; never falls."""

    @property
    def seconds(self) -> float:
        """From the first byte's start to the end, or to now; 0.0 before the start."""

    def wait(self, bytes: int | None = None, timeout_s: float = 0.0) -> bool:
        """Wait until the first `bytes`, or all, are in; say whether they are.

        False after `timeout_s`, or at once when the copy has been cancelled or has failed. Raises
        ValueError for more bytes than there are, DeviceLost where the device behind the link is.
        """

    def cancel(self) -> None:
        """End the copy; nothing touches its memory once this returns.

        Its progress stays true. Nothing happens to a copy that has ended, and what waits for this
        one in `after` goes on: cancel that first where it makes no sense alone.
        """

    def raise_priority(self, priority: int) -> None:
        """Move it, and what it waits for, forward to `priority`; never back. Raises ValueError."""
