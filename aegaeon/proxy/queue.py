"""How much may be open at a proxy: requests that wait, bytes of prompts, and for how long."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from aegaeon.config import Settings
from aegaeon.errors import KeyQueueFull, QueueFull
from aegaeon.proxy.generation import Generation
from aegaeon.proxy.outlook import Outlook, Room
from aegaeon.scheduler.fairness import NEWCOMERS, RESERVE, is_beyond_share
from aegaeon.scheduler.ranks import level, room_of
from aegaeon.specs import Bounds
from aegaeon.types import ModelId, ModelSpec

MOST_KEPT = 3 / 4  # of the room, for those who were told to come


class _Held(msgspec.Struct):
    """What one key has open."""

    weight: float
    requests: int = 0
    waiting: int = 0
    bytes: int = 0


@dataclass(slots=True, eq=False)
class Place:
    """One request's."""

    generation: Generation
    waits: bool = True


class Queue:
    """The bounds, and what of them is taken. Owned by the gateway.

    A request waits until its first token. Within the last RESERVE of the room a key takes no more
    than its share: by its weight, among the keys that have something open. Whoever asks without a
    key shares with nobody. Models of a lower priority than others have less room to wait.
    """

    def __init__(self, settings: Settings, outlook: Outlook | None = None) -> None:
        """`outlook` predicts when there is room again."""
        self._outlook = outlook
        self._max_waiting = settings.max_waiting * settings.prefilling_count
        self._max_open_mb = settings.max_open_mb
        self._waiting = 0
        self._bytes = 0  # of the prompts of those that are open
        self._held: dict[str, _Held] = {}  # by key, of those that have something open
        self._levels: dict[ModelId, int] = {}
        self._room: dict[ModelId, int] = {}  # of models that have not all of it
        self.request_timeout_s = settings.request_timeout_s

    def serve(self, specs: Iterable[ModelSpec]) -> None:
        """These are served from here on, with their priorities."""
        levels = {spec.id: level(spec.priority) for spec in specs}
        rooms = {m: room_of(self._max_waiting, own, levels.values()) for m, own in levels.items()}
        self._room = {model: room for model, room in rooms.items() if room < self._max_waiting}

    def bound(self, bounds: Bounds) -> None:
        """Go by other bounds from here on; requests that are open keep their deadlines."""
        self._max_open_mb = bounds.max_open_mb
        self.request_timeout_s = bounds.request_timeout_s

    def enter(self, generation: Generation) -> Place:
        """Count one more, which waits. Raises QueueFull; one alone is never too much."""
        held = self._held.get(generation.key)
        was_told = self._outlook is not None and self._outlook.was_told(generation.key)
        if self._waiting >= self._max_waiting:
            raise self._full("waiting", f"{self._max_waiting} requests are waiting")
        if not was_told and (held is not None or not generation.key):
            self._check_kept()
        if self._waiting >= self._room.get(generation.model, self._max_waiting):
            text = "the room to wait that is left is for models of a higher priority"
            raise self._full("waiting", f"{self._waiting} requests are waiting, and {text}")
        total = self._bytes + generation.held_bytes
        if self._held and total > self._max_open_mb * 1e6:
            text = f"prompts of {self._max_open_mb:g} MB, all there may be, are open"
            raise self._full("bytes", text)
        if held is None:
            held = _Held(generation.weight)
        elif generation.key:
            held.weight = generation.weight
            self._check_share(generation.key, held, generation.held_bytes)
        self._held[generation.key] = held
        held.requests += 1
        held.waiting += 1
        held.bytes += generation.held_bytes
        self._waiting += 1
        self._bytes = total
        return Place(generation)

    def begin(self, place: Place) -> None:
        """It has its first token. Idempotent."""
        if place.waits:
            place.waits = False
            self._waiting -= 1
            self._held[place.generation.key].waiting -= 1

    def leave(self, place: Place) -> None:
        """Count one less."""
        self.begin(place)
        generation = place.generation
        held = self._held[generation.key]
        held.requests -= 1
        held.bytes -= generation.held_bytes
        if not held.requests:
            del self._held[generation.key]
        self._bytes -= generation.held_bytes

    def retry_after_s(self) -> float:
        """Return when one should come again whom an instance has refused."""
        return 1.0 if self._outlook is None else self._outlook.wait_s("waiting", None)

    def _check_kept(self) -> None:
        """Raise QueueFull where what is left is for those who were told to come about now."""
        free = self._max_waiting - self._waiting
        kept = 0 if self._outlook is None else self._outlook.kept()
        # Not all of a large room: they may not come.
        if free <= min(kept, math.ceil(self._max_waiting * MOST_KEPT)):
            text = "the room to wait that is left is for those who were told to come now"
            raise self._full("waiting", f"{self._waiting} requests are waiting, and {text}")

    def _check_share(self, key: str, held: _Held, more: int) -> None:
        """Raise QueueFull where a key that has `held` open takes room that is for others."""
        share = held.weight / sum(one.weight for one in self._held.values())
        others = "and the room that is left is for other keys"
        if held.waiting and is_beyond_share(self._max_waiting, self._waiting, held.waiting, share):
            text = f"this key has {held.waiting} requests waiting, {others}"
            raise self._full("waiting", text, key)
        limit = self._max_open_mb * 1e6
        room_bytes, total_bytes = limit * (1 - RESERVE), self._bytes + more
        is_over = total_bytes > room_bytes and held.bytes + more > room_bytes * share
        if is_over or total_bytes > limit * (1 - RESERVE * NEWCOMERS):
            text = f"this key has prompts of {held.bytes / 1e6:g} MB open, {others}"
            raise self._full("bytes", text, key)

    def _full(self, room: Room, text: str, key: str | None = None) -> QueueFull:
        kind = QueueFull if key is None else KeyQueueFull
        error = kind(f"{text}; try again later")
        if self._outlook is not None:
            free = self._max_waiting - self._waiting if room == "waiting" and key is None else 0
            error.retry_after_s = self._outlook.wait_s(room, key, free)
        return error
