"""What the clients' keys have had of a device, so that none of them has all of it.

Weighted fair sharing by service given, as in "Fairness in Serving Large Language Models" (VTC,
OSDI'24): each key is charged the seconds that its requests computed, over its weight; one that
comes, or comes back, is owed nothing for the time when it asked for nothing. Where only one key has
requests, nothing is counted.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from aegaeon.types import RequestId

MAX_REMEMBERED = 1024  # keys that have no requests


@dataclass(slots=True)
class _Key:
    weight: float
    had_s: float  # of the device, over the weight
    requests: int = 0


class Shares:
    """The keys that have requests at a device. `version` changes with what anybody is ahead."""

    def __init__(self) -> None:
        self.version = 0
        self._key_of: dict[RequestId, str] = {}
        self._keys: dict[str, _Key] = {}
        self._gone: OrderedDict[str, float] = OrderedDict()
        # What the keys have had that have had least and most, as of a version.
        self._bounds: tuple[int, float, float] = (-1, 0.0, 0.0)

    @property
    def is_shared(self) -> bool:
        """Whether more than one key has requests."""
        return len(self._keys) > 1

    def enter(self, request: RequestId, name: str, weight: float) -> None:
        """A request of the key `name` came."""
        key = self._keys.get(name)
        if key is None:
            floor_s = min((one.had_s for one in self._keys.values()), default=0.0)
            key = self._keys[name] = _Key(weight, max(floor_s, self._gone.pop(name, 0.0)))
            self.version += 1
        key.weight = weight
        key.requests += 1
        self._key_of[request] = name

    def leave(self, request: RequestId) -> None:
        """A request ended."""
        name = self._key_of.pop(request, None)
        if name is None:
            return
        key = self._keys[name]
        key.requests -= 1
        if key.requests:
            return
        del self._keys[name]
        self.version += 1
        self._gone[name] = key.had_s
        if len(self._gone) > MAX_REMEMBERED:
            self._gone.popitem(last=False)

    def charge(self, requests: Iterable[RequestId], took_s: float) -> None:
        """`requests` computed together for `took_s`."""
        if not self.is_shared:
            return
        keys = [self._keys[self._key_of[r]] for r in requests if r in self._key_of]
        for key in keys:
            key.had_s += took_s / len(keys) / key.weight
        self.version += 1

    def ahead_s(self, request: RequestId) -> float:
        """Return how much more of the device its key has had than the one that has had least: in
        seconds, over their weights."""
        if not self.is_shared:
            return 0.0
        return self._keys[self._key_of[request]].had_s - self._look()[1]

    def is_owed(self, request: RequestId, more_s: float) -> bool:
        """Whether some other key has had more by `more_s`, in the same measure: what is late of it
        is late for that."""
        if not self.is_shared:
            return False
        return self._look()[2] - self._keys[self._key_of[request]].had_s > more_s

    def _look(self) -> tuple[int, float, float]:
        if self._bounds[0] != self.version:
            had = [key.had_s for key in self._keys.values()]
            self._bounds = self.version, min(had), max(had)
        return self._bounds

    def worth(self, requests: Iterable[RequestId]) -> float:
        """Return what each of `requests` counts, on the average, where all of a key together count
        as much as its weight; 1 where they count alike."""
        if not self.is_shared:
            return 1.0
        keys = [self._keys[self._key_of[request]] for request in requests]
        if not keys:
            return 1.0
        total = sum(key.weight for key in self._keys.values()) / len(self._key_of)
        return sum(key.weight / key.requests for key in keys) / len(keys) / total
