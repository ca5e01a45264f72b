"""What rests on a device and would be lost there with the next model's turn goes to the host."""

from dataclasses import dataclass

from aegaeon._native import CopyEngine, CopyTicket
from aegaeon.errors import CopyError, OutOfBlocks
from aegaeon.memory.kv import KvShape
from aegaeon.memory.prefixes import Entry, Prefixes
from aegaeon.memory.traffic import Traffic

# Behind everything: nobody waits for it.
LAST = 2
# One in so many of the blocks that the host has free: not all of them are in others' way meanwhile.
MOST_SHARE = 4


@dataclass(slots=True)
class _Leaving:
    entry: Entry
    block: int  # on the host


class Spill:
    """Copies blocks that rest on the device, while they rest: whoever needs their room takes it,
    and then what has come to the host counts for nothing."""

    def __init__(
        self, device: Prefixes, host: Prefixes, copier: CopyEngine, traffic: Traffic
    ) -> None:
        self._device = device
        self._host = host
        self._copier = copier
        self._traffic = traffic
        self._leaving: list[_Leaving] = []
        self._ticket: CopyTicket | None = None
        device.ended = {}

    @property
    def ticket(self) -> CopyTicket | None:
        """Of the copy that is under way."""
        return self._ticket

    def begin(self) -> None:
        """Have go out what has come to rest since the last time, unless another copy is under way:
        of each shape the last ones, as many as the host has room for."""
        self.collect()
        if self._ticket is not None or not self._device.ended:
            return
        wanted: dict[KvShape, list[Entry]] = {}
        for entry in self._device.ended.values():
            if not entry.uses and not self._host.has(entry.shape, entry.key):
                wanted.setdefault(entry.shape, []).append(entry)
        self._device.ended = {}
        for shape, entries in wanted.items():
            room = self._host.pool.free_blocks(shape) // MOST_SHARE
            # Words grow with the time at which a block was laid to rest.
            last = sorted(entries, key=lambda entry: entry.word, reverse=True)[:room]
            self._choose(shape, last)
        if self._leaving:
            self._submit()

    def collect(self) -> None:
        """Let the host know what has come."""
        ticket = self._ticket
        if ticket is None or not (ticket.is_done or ticket.is_cancelled or ticket.has_failed):
            return
        if ticket.is_done:
            for one in self._leaving:
                # One that has been evicted may have been evicted before it was copied.
                if self._device.is_here(one.entry):
                    self._host.keep(one.entry, one.block)
                else:
                    self._host.pool.free(one.entry.shape, (one.block,))
            self._leaving = []
        self.stop()

    def stop(self) -> bool:
        """Copy no more, and leave the host's room to others; say whether there was any."""
        if self._ticket is not None:
            self._ticket.cancel()
            self._ticket = None
        leaving, self._leaving = self._leaving, []
        for one in leaving:
            self._host.pool.free(one.entry.shape, (one.block,))
        return bool(leaving)

    def _choose(self, shape: KvShape, entries: list[Entry]) -> None:
        try:
            blocks = self._host.pool.allocate(shape, len(entries))
        except OutOfBlocks:
            return  # others were quicker
        self._leaving += [_Leaving(*pair) for pair in zip(entries, blocks, strict=True)]

    def _submit(self) -> None:
        segments = []
        for one in self._leaving:
            shape = one.entry.shape
            to = self._host.pool.pages(shape).data_ptr() + one.block * shape.page_bytes
            start = self._device.pool.pages(shape).data_ptr() + one.entry.block * shape.page_bytes
            segments.append((to, start, shape.block_bytes))
        try:
            self._ticket = self._copier.submit(segments, LAST, is_outward=True)
        except CopyError:
            self.stop()  # too much else is under way
            return
        self._traffic.watch("kv_out", self._ticket)
