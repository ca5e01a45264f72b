"""The seam by which keys and values leave an engine as bytes, and come to one: between engines that
share no memory. No torch here."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from aegaeon.types import KvHandle, ModelId, RequestId


class Exposed(NamedTuple):
    """What a sequence has, and what it is: the bytes of its blocks, in order."""

    kv: KvHandle
    views: list[memoryview]


@dataclass(slots=True)
class Room:
    """Blocks for what `kv` names, to be written through `views`; owned by who made it until it is
    adopted or freed."""

    shape: object  # as the engine lays it out
    kv: KvHandle
    blocks: list[int]
    views: list[memoryview]


class KvExchange(ABC):
    """Of one engine. Any thread may call it."""

    @abstractmethod
    def expose(self, request: RequestId) -> Exposed | None:
        """Return all that a sequence set apart has of keys and values, which may have to be copied
        first; None where there is nothing to have. The bytes stay as they are until it is released
        or resumed, and after that may be anything."""

    @abstractmethod
    def make_room(self, model: ModelId, kv: KvHandle) -> Room:
        """Return blocks for what `kv` names. Another node says so: its numbers may be anything.
        Raises KvGone where they make no sense here, OutOfBlocks."""

    @abstractmethod
    def free(self, room: Room) -> None:
        """Give the blocks back, whatever is in them."""
