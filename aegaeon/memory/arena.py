"""A device's memory for weights: one allocation up front, in which models come, go and move.

`Layout` says which bytes are whose and touches none; `Arena` is a layout with memory behind it,
this host's unless it is given another.
"""

import contextlib
import ctypes
import errno
import mmap
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol

import msgspec

from aegaeon.errors import BudgetTooSmall
from aegaeon.types import ModelId

ALIGNMENT = 4096  # of every model: a page, and more than any device asks for
_POPULATE_WRITE = 23  # Linux's MADV_POPULATE_WRITE, which Python does not name
_POPULATE_STEP = 64 << 20  # madvise keeps the GIL


class Place(msgspec.Struct, frozen=True):
    """The bytes of one model: `[offset, offset + size_bytes)` of the arena."""

    model: ModelId
    offset: int
    size_bytes: int

    @property
    def end(self) -> int:
        """The first byte behind it, rounded up to where the next one may start."""
        return -(-(self.offset + self.size_bytes) // ALIGNMENT) * ALIGNMENT


class Move(msgspec.Struct, frozen=True):
    """Bytes of a model that go to a lower offset, perhaps over themselves."""

    model: ModelId
    from_offset: int
    to_offset: int
    size_bytes: int


class Compaction(msgspec.Struct, frozen=True):
    """Moves, in this order, that join gaps into one; and the layout's state that they belong to."""

    moves: tuple[Move, ...]
    version: int

    @property
    def size_bytes(self) -> int:
        """Bytes to be copied."""
        return sum(move.size_bytes for move in self.moves)


class Layout:
    """Places of models in `[0, capacity_bytes)`, which never overlap.

    There are two bump pointers, one from either end. In the usual state, one model that computes
    and the next one that is prefetched, whichever leaves is at an end, so that all free bytes are
    one gap and nothing has to move: no area is set aside for the prefetch, and none lies idle
    without one. A third model goes to the smallest gap that holds it, and what was left between
    models is joined by a compaction. Whoever comes back goes to where it lay, if that is an end of
    a gap: what a device keeps of a model's addresses is good again then.
    """

    def __init__(self, capacity_bytes: int) -> None:
        """Start empty."""
        self.capacity_bytes = capacity_bytes // ALIGNMENT * ALIGNMENT
        self._places: list[Place] = []  # by offset
        self._last: dict[ModelId, int] = {}  # where each model lay before, that is not here
        self._version = 0

    @property
    def used_bytes(self) -> int:
        """Bytes taken, with what alignment leaves behind each model."""
        return sum(place.end - place.offset for place in self._places)

    @property
    def largest_gap_bytes(self) -> int:
        """What may be placed now without a compaction."""
        return max(size for _, size in self._gaps())

    def places(self) -> tuple[Place, ...]:
        """Return all places by offset."""
        return tuple(self._places)

    def get(self, model: ModelId) -> Place | None:
        """Return where `model` is, if it is here."""
        return next((place for place in self._places if place.model == model), None)

    def allocate(self, model: ModelId, size_bytes: int) -> Place | None:
        """Place `model`; None when no gap holds it: free others, or compact.

        Raises BudgetTooSmall when even the empty arena would not. The model must not be here yet.
        """
        assert self.get(model) is None and size_bytes > 0, model
        if size_bytes > self.capacity_bytes:
            raise BudgetTooSmall(
                f"{model} has {size_bytes} bytes of weights, the device's arena "
                f"{self.capacity_bytes}; give it more memory, or leave the model out"
            )
        found = self._find(self._last.get(model), _aligned(size_bytes))
        if found is None:
            return None
        at, offset = found
        place = Place(model, offset, size_bytes)
        self._places.insert(at, place)
        self._version += 1
        return place

    def _find(self, last: int | None, aligned: int) -> tuple[int, int] | None:
        """Return which gap is to hold so many bytes, and where they begin there."""
        gaps = list(self._gaps())
        fitting = [(size, at) for at, (_, size) in enumerate(gaps) if size >= aligned]
        for size, at in fitting:
            start, _ = gaps[at]
            if last in (start, start + size - aligned):
                return at, last
        if not fitting:
            return None
        size, at = min(fitting)
        start, _ = gaps[at]
        # The last gap is filled from its far end, unless nothing lies before it either.
        is_last = 0 < at == len(self._places)
        return at, start + size - aligned if is_last else start

    def free(self, model: ModelId) -> None:
        """Give up the bytes of `model`, which must be here and touched by no copy or kernel."""
        place = self.get(model)
        assert place is not None, model
        self._places.remove(place)
        self._last[model] = place.offset
        self._version += 1

    def plan_compaction(
        self, size_bytes: int, fixed: Collection[ModelId] = ()
    ) -> Compaction | None:
        """Return the fewest bytes of moves that make a gap of `size_bytes`; None: there are none.

        Models in `fixed` (computing, or being copied) stay where they are. Neighbouring gaps are
        joined by sliding what is between them down, so the order of the models stays.
        """
        gaps = [size for _, size in self._gaps()]
        best: tuple[int, int, int] | None = None  # bytes to move; places [first, last) move
        for first in range(len(gaps)):
            joined = moved = 0
            for last in range(first, len(gaps)):
                joined += gaps[last]
                if joined >= _aligned(size_bytes):
                    best = min(best or (moved, first, last), (moved, first, last))
                    break
                if last == len(self._places) or self._places[last].model in fixed:
                    break
                moved += self._places[last].size_bytes
        if best is None:
            return None
        return Compaction(tuple(self._slide_down(*best[1:])), self._version)

    def commit(self, compaction: Compaction) -> None:
        """Enter that the bytes of all moves have been copied.

        Nothing may have been placed or freed since the compaction was planned.
        """
        assert compaction.version == self._version, "the arena has changed under a compaction"
        moved = {move.model: move.to_offset for move in compaction.moves}
        self._places = [
            Place(place.model, moved.get(place.model, place.offset), place.size_bytes)
            for place in self._places
        ]
        self._version += 1

    def _gaps(self) -> Iterator[tuple[int, int]]:
        """Yield offset and size of the gap before each place, and of the one behind them all."""
        end = 0
        for place in self._places:
            yield end, place.offset - end
            end = place.end
        yield end, self.capacity_bytes - end

    def _slide_down(self, first: int, last: int) -> Iterator[Move]:
        to = self._places[first - 1].end if first else 0
        for place in self._places[first:last]:
            if place.offset != to:
                yield Move(place.model, place.offset, to, place.size_bytes)
            to += place.end - place.offset


class Memory(Protocol):
    """What an arena lies in; for as long as that lives."""

    @property
    def address(self) -> int:
        """Where it begins, as copies count."""

    def part(self, offset: int, size_bytes: int) -> Any:
        """Return some of its bytes, as a buffer or a tensor [bytes] uint8."""


class HostMemory:
    """Memory of this host's, which is there from the start."""

    def __init__(self, size_bytes: int) -> None:
        """Map and touch all of it. Raises BudgetTooSmall when the system has not as much."""
        try:
            self._memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE)
            _populate(self._memory)
        except (OSError, OverflowError) as error:
            raise BudgetTooSmall(
                f"the system has no {size_bytes} bytes for a device's arena ({error}); give it less"
            ) from error
        self._view = memoryview(self._memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    def part(self, offset: int, size_bytes: int) -> memoryview:
        """Return some of its bytes, writable."""
        return self._view[offset : offset + size_bytes]


class Arena(Layout):
    """A layout with memory behind it."""

    def __init__(self, capacity_bytes: int, memory: Memory | None = None) -> None:
        """Lie in `memory`, of at least as many bytes; without one, in this host's, all of which is
        there from the start. Raises BudgetTooSmall when the system has not as much."""
        super().__init__(capacity_bytes)
        if self.capacity_bytes <= 0:
            raise BudgetTooSmall(f"an arena of {capacity_bytes} bytes is none; give it {ALIGNMENT}")
        self._memory = HostMemory(self.capacity_bytes) if memory is None else memory
        self.address = self._memory.address
        self.view = self._memory.part(0, self.capacity_bytes)

    def bytes_of(self, place: Place) -> Any:
        """Return the place's bytes, a buffer or a tensor; they are its model's until it is freed or
        moved."""
        return self._memory.part(place.offset, place.size_bytes)

    def segments(self, moves: Sequence[Move]) -> list[tuple[int, int, int]]:
        """Return the moves as one copy's segments: to address, from address, bytes."""
        return [
            (self.address + move.to_offset, self.address + move.from_offset, move.size_bytes)
            for move in moves
        ]


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


def _populate(memory: mmap.mmap) -> None:
    """Have all pages there, huge ones where the system gives them: copies then pay for no fault."""
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    try:
        for start in range(0, len(memory), _POPULATE_STEP):
            memory.madvise(_POPULATE_WRITE, start, min(_POPULATE_STEP, len(memory) - start))
    except OSError as error:
        if error.errno != errno.EINVAL:  # an older kernel: pages come when they are first written
            raise
