"""How much may be open at a proxy: requests that wait, that wait for weights, that are open at all,
bytes of prompts; and for how long."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from aegaeon.config import Settings
from aegaeon.errors import InvalidRequest, KeyQueueFull, ModelLoading, QueueFull, TooManyOpen
from aegaeon.proxy.generation import Generation
from aegaeon.proxy.outlook import Outlook, Room
from aegaeon.scheduler.fairness import NEWCOMERS, RESERVE, is_beyond_share
from aegaeon.scheduler.ranks import level, room_of
from aegaeon.specs import Bounds
from aegaeon.types import ModelId, ModelSpec

MOST_KEPT = 3 / 4  # of the room, for those who were told to come
MOST_LOADING = 3 / 4  # of the room to wait, for models that are on no device while others are
_KINDS: dict[Room, type[QueueFull]] = {"loading": ModelLoading, "open": TooManyOpen}


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
    held_bytes: int
    waits: bool = True
    is_left: bool = False


class Queue:
    """The bounds, and what of them is taken. Owned by the gateway.

    A request waits until its first token, and is open until its last. Within the last RESERVE of
    the room a key takes no more than its share: by its weight, among the keys that have something
    open. Whoever asks without a key shares with nobody. Models of a lower priority than others have
    less room to wait, and so have those that must be loaded, all together: whoever asks for one
    that is there finds some.
    """

    def __init__(self, settings: Settings, outlook: Outlook | None = None) -> None:
        """`outlook` predicts when there is room again."""
        self._outlook = outlook
        self._prefilling = settings.prefilling_count
        self._max_waiting = settings.max_waiting * self._prefilling
        self._instances = settings.instance_count
        self._max_open = settings.max_open * self._instances
        self._max_open_mb = settings.max_open_mb
        self._waiting = 0
        self._waiting_for: Counter[ModelId] = Counter()
        self._open = 0
        self._bytes = 0  # of the prompts of those that are open
        self._held: dict[str, _Held] = {}  # by key, of those that have something open
        self._room: dict[ModelId, int] = {}  # of models that have not all of it
        self._served: tuple[ModelSpec, ...] = ()
        self.request_timeout_s = settings.request_timeout_s

    def serve(self, specs: Iterable[ModelSpec]) -> None:
        """These are served from here on, with their priorities."""
        self._served = tuple(specs)
        rooms = self._rooms(self._max_waiting)
        self._room = {model: room for model, room in rooms.items() if room < self._max_waiting}

    def _rooms(self, most: int) -> dict[ModelId, int]:
        """Return how many of `most` places each model may have."""
        levels = {spec.id: level(spec.priority) for spec in self._served}
        return {m: room_of(most, own, levels.values()) for m, own in levels.items()}

    def bound(self, bounds: Bounds) -> None:
        """Go by other bounds from here on; requests that are open keep their deadlines."""
        self._max_waiting = bounds.max_waiting * self._prefilling
        self.serve(self._served)
        self._max_open = bounds.max_open * self._instances
        self._max_open_mb = bounds.max_open_mb
        self.request_timeout_s = bounds.request_timeout_s

    def enter(self, generation: Generation) -> Place:
        """Count one more, which waits. Raises QueueFull; one alone is never too many bytes."""
        return self.enter_all((generation,))[0]

    def enter_all(self, generations: Sequence[Generation]) -> list[Place]:
        """Count more, all of one model and key, or none of them. Raises QueueFull, InvalidRequest
        for so many that there will never be room."""
        first, count = generations[0], len(generations)
        more = sum(one.held_bytes for one in generations)
        held = self._held.get(first.key)
        self._check_ever(first, count, more)
        self._check_waiting(first, held, count)
        self._check_loading(first.model, count)
        if self._open + count > self._max_open:
            has = f"{min(self._open, self._max_open)} requests are open"
            raise self._full("open", count, has, "--max-open")
        if self._held and self._bytes + more > self._max_open_mb * 1e6:
            text = f"{self._max_open_mb:g} MB, all there may be, are held for open requests"
            raise self._full("bytes", count, text, "--max-open-mb")
        if first.key and self._held and (held is not None or count > 1):
            self._check_share(first, held or _Held(first.weight), count, more)
        held = self._held.setdefault(first.key, held or _Held(first.weight))
        held.weight = first.weight
        held.requests += count
        held.waiting += count
        held.bytes += more
        self._waiting += count
        self._waiting_for[first.model] += count
        self._open += count
        self._bytes += more
        return [Place(one, one.held_bytes) for one in generations]

    def begin(self, place: Place) -> None:
        """It has its first token. Idempotent."""
        if place.waits:
            place.waits = False
            self._waiting -= 1
            self._held[place.generation.key].waiting -= 1
            model = place.generation.model
            self._waiting_for[model] -= 1
            if not self._waiting_for[model]:
                del self._waiting_for[model]

    def hold(self, place: Place, more: int) -> None:
        """So many bytes more are held for its answer, or fewer; who is in may go beyond the bound,
        which lets nobody else in then."""
        if not place.is_left:
            place.held_bytes += more
            self._held[place.generation.key].bytes += more
            self._bytes += more

    def leave(self, place: Place) -> None:
        """Count one less."""
        self.begin(place)
        key, place.is_left = place.generation.key, True
        held = self._held[key]
        held.requests -= 1
        held.bytes -= place.held_bytes
        if not held.requests:
            del self._held[key]
        self._open -= 1
        self._bytes -= place.held_bytes

    def retry_after_s(self) -> float:
        """Return when one should come again whom an instance has refused."""
        return 1.0 if self._outlook is None else self._outlook.wait_s("waiting", None)

    def _check_ever(self, first: Generation, count: int, more: int) -> None:
        """Raise InvalidRequest for so many at once that there is no room when nothing is open."""
        if count == 1:
            return
        # They may all go to one instance, which keeps the same part of its room for others.
        own = self._max_waiting // self._prefilling
        waiting = self._rooms(own).get(first.model, own)
        if first.key:
            waiting = min(waiting, own - int(own * RESERVE))
        most, setting = min((waiting, "--max-waiting"), (self._max_open, "--max-open"))
        has = f"{count} choices (prompts times n) are asked for at once"
        if count > most:
            text = f"{has}, and at most {most} of {first.model!r} are taken"
            raise InvalidRequest(f"{text}; send fewer at a time, or raise {setting}")
        limit_mb = self._max_open_mb
        if more > limit_mb * 1e6:
            text = f"{has}, which take {more / 1e6:.1f} MB, and {limit_mb:g} MB may be held"
            raise InvalidRequest(f"{text}; send fewer at a time, or raise --max-open-mb")

    def _check_waiting(self, generation: Generation, held: _Held | None, count: int) -> None:
        """Raise QueueFull where so many more may not wait."""
        most, key = self._max_waiting, generation.key
        was_told = self._outlook is not None and self._outlook.was_told(key)
        has = f"{self._waiting} requests are waiting"
        if self._waiting + count > most:
            raise self._full("waiting", count, has, "--max-waiting")
        if not was_told and (held is not None or not key):
            self._check_kept(count)
        if self._waiting + count > self._room.get(generation.model, most):
            text = "the room to wait that is left is for models of a higher priority"
            raise self._full("waiting", count, f"{has}, and {text}")

    def _check_loading(self, model: ModelId, count: int) -> None:
        """Raise ModelLoading where too many wait for weights while other models have theirs."""
        room = self._max_waiting - int(self._max_waiting * (1 - MOST_LOADING))
        if self._waiting + count <= room or self._outlook is None:
            return
        resident = self._outlook.resident()
        if not resident or model in resident:
            return
        loading = sum(n for other, n in self._waiting_for.items() if other not in resident)
        # Where none waits so many at once would be refused for ever.
        if loading and loading + count > room:
            text = f"{model!r} must be loaded first, and {loading} requests wait for such models"
            raise self._full("loading", count, text, "--max-waiting")

    def _check_kept(self, count: int) -> None:
        """Raise QueueFull where what is left is for those who were told to come about now."""
        free = self._max_waiting - self._waiting
        kept = 0 if self._outlook is None else self._outlook.kept()
        # Not all of a large room: they may not come.
        if free - count < min(kept, math.ceil(self._max_waiting * MOST_KEPT)):
            text = "the room to wait that is left is for those who were told to come now"
            raise self._full("waiting", count, f"{self._waiting} requests are waiting, and {text}")

    def _check_share(self, first: Generation, held: _Held, count: int, more: int) -> None:
        """Raise KeyQueueFull where a key that has `held` open takes room that is for others."""
        key, before = first.key, count - 1  # the last of them is to find room
        weights = sum(one.weight for name, one in self._held.items() if name != key)
        share = first.weight / (weights + first.weight)
        waiting, own = self._waiting + before, held.waiting + before
        if self._waiting and own and is_beyond_share(self._max_waiting, waiting, own, share):
            raise self._key_full("waiting", f"{held.waiting} requests waiting", key)
        is_open = held.requests + before
        if is_beyond_share(self._max_open, self._open + before, is_open, share):
            raise self._key_full("open", f"{held.requests} requests open", key)
        limit = self._max_open_mb * 1e6
        room_bytes, total_bytes = limit * (1 - RESERVE), self._bytes + more
        is_over = total_bytes > room_bytes and held.bytes + more > room_bytes * share
        if is_over or total_bytes > limit * (1 - RESERVE * NEWCOMERS):
            raise self._key_full("bytes", f"{held.bytes / 1e6:g} MB held for open requests", key)

    def _full(self, room: Room, count: int, text: str, setting: str = "") -> QueueFull:
        """Return who is refused what, and what an operator may raise."""
        remedy = f"try again later, or raise {setting}" if setting else "try again later"
        if count > 1:
            text = f"{text}, and {count} more are asked for at once"
        error = _KINDS.get(room, QueueFull)(f"{text}; {remedy}")
        if self._outlook is not None:
            free = self._max_waiting - self._waiting if room == "waiting" else 0
            error.retry_after_s = self._outlook.wait_s(room, None, free - (count - 1))
        return error

    def _key_full(self, room: Room, has: str, key: str) -> KeyQueueFull:
        text = f"this key has {has}, and the room that is left is for other keys; try again later"
        error = KeyQueueFull(text)
        if self._outlook is not None:
            error.retry_after_s = self._outlook.wait_s(room, key, 0)
        return error
