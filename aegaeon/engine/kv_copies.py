"""What the host has of a sequence whose device has memory of its own; copies between the two."""

from dataclasses import dataclass, field

from aegaeon._native import CopyTicket
from aegaeon.memory.kv import BLOCK_TOKENS, KvPool, KvShape
from aegaeon.memory.prefixes import Held

Blocks = tuple[KvPool, list[int]]
Segments = list[tuple[int, int, int]]  # to, from, bytes


@dataclass(slots=True)
class HostCopy:
    """What the host has of a sequence: its first `tokens`, once `going_out` has ended.

    That begins with block number `first` of the sequence. No copy is under way beside these two.
    """

    held: Held = field(default_factory=Held)
    tokens: int = 0
    first: int = 0
    going_out: CopyTicket | None = None
    coming_in: CopyTicket | None = None

    @property
    def blocks(self) -> list[int]:
        """The blocks of `held`."""
        return self.held.blocks

    def stop(self) -> None:
        """Have no copy touch the blocks, here or on the device, any more."""
        for ticket in (self.going_out, self.coming_in):
            if ticket is not None:
                ticket.cancel()

    def settle(self, block_bytes: int) -> None:
        """End what is going out: the host has what has come there so far."""
        if self.going_out is not None and not self.going_out.is_done:
            self.going_out.cancel()
            whole = self.first + self.going_out.progress_bytes // block_bytes
            self.tokens = min(self.tokens, whole * BLOCK_TOKENS)
        self.going_out = None


def segments_of(shape: KvShape, to: Blocks, start: Blocks) -> Segments:
    """Return the copies of whole blocks, one to one."""
    to_address, start_address = (pool.pages(shape).data_ptr() for pool, _ in (to, start))
    return [
        (
            to_address + to_block * shape.page_bytes,
            start_address + start_block * shape.page_bytes,
            shape.block_bytes,
        )
        for to_block, start_block in zip(to[1], start[1], strict=True)
    ]
