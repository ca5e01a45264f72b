"""What the clients' keys have had of a device, and of each key its models, so that none of them has
all of it; and who may wait while there is little room left.

Weighted fair sharing by service given, as in "Fairness in Serving Large Language Models" (VTC,
OSDI'24): each key is charged the seconds that its requests computed, over its weight; one that
comes, or comes back, is owed nothing for the time when it asked for nothing. What a key has, its
models share in the same way, alike. Where only one key has requests, and of one model, nothing is
counted; nor are the models of those who ask without a key told apart.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from aegaeon.types import ModelId, RequestId

MAX_REMEMBERED = 1024  # keys that have no requests
# Of all room to wait, the part that no key gets beyond its share: who comes behind a flood finds
# some. Of that, the part for keys that have nothing waiting.
RESERVE, NEWCOMERS = 1 / 8, 1 / 4


def is_beyond_share(most: int, taken: int, own: int, share: float) -> bool:
    """Whether a key that has `own` of the `taken` places, of `most`, takes with one more what is
    for others: within the last RESERVE more than its `share`, or what is for newcomers."""
    # Of few places there is no part to set aside, or just one.
    reserve = int(most * RESERVE)
    kept = min(reserve, max(1, int(reserve * NEWCOMERS)))
    room = most - reserve
    return taken + 1 > most - kept or (taken + 1 > room and own + 1 > room * share)


@dataclass(slots=True)
class _Member:
    """One of those that share."""

    weight: float
    had_s: float  # of the device, over the weight
    requests: int = 0
    parts: "_Members | None" = None  # who share what it has; None: nobody does


@dataclass(slots=True)
class _Members:
    """Those that have requests, by name; what the others had is remembered for a while."""

    known: dict[str, _Member] = field(default_factory=dict)
    gone: OrderedDict[str, float] = field(default_factory=OrderedDict)
    # What those have had that have had least and most; None: to be found.
    bounds: tuple[float, float] | None = None

    @property
    def is_shared(self) -> bool:
        return len(self.known) > 1

    def enter(self, name: str, weight: float) -> tuple[_Member, bool]:
        """One more request of `name`; return who that is, and whether it has come just now."""
        member, is_new = self.known.get(name), False
        if member is None:
            floor_s = min((one.had_s for one in self.known.values()), default=0.0)
            member = _Member(weight, max(floor_s, self.gone.pop(name, 0.0)))
            self.known[name], self.bounds, is_new = member, None, True
        member.weight = weight
        member.requests += 1
        return member, is_new

    def leave(self, name: str) -> bool:
        """One less; return whether it was the last."""
        member = self.known[name]
        member.requests -= 1
        if member.requests:
            return False
        del self.known[name]
        self.bounds = None
        self.gone[name] = member.had_s
        if len(self.gone) > MAX_REMEMBERED:
            self.gone.popitem(last=False)
        return True

    def charge(self, member: _Member, took_s: float) -> None:
        """One of them has had so much more."""
        member.had_s += took_s / member.weight
        self.bounds = None

    def least_s(self) -> float:
        """What that one has had that has had least."""
        return self._look()[0]

    def most_s(self) -> float:
        """What that one has had that has had most."""
        return self._look()[1]

    def _look(self) -> tuple[float, float]:
        if self.bounds is None:
            had = [one.had_s for one in self.known.values()]
            self.bounds = min(had), max(had)
        return self.bounds


class _Asker(NamedTuple):
    """Whose a request is."""

    name: str
    key: _Member
    model: ModelId
    part: _Member | None  # the model's, of what the key has


class Shares:
    """The keys that have requests at a device. `version` changes with what anybody is ahead."""

    def __init__(self) -> None:
        self.version = 0
        self._asker_of: dict[RequestId, _Asker] = {}
        self._keys = _Members()
        self._split = 0  # keys that have requests of more than one model

    @property
    def is_shared(self) -> bool:
        """Whether more than one key has requests, or one for more than one model."""
        return self._keys.is_shared or self._split > 0

    def enter(self, request: RequestId, name: str, weight: float, model: ModelId = "") -> None:
        """A request of the key `name` came."""
        key, is_new = self._keys.enter(name, weight)
        part = None
        if name:
            if key.parts is None:
                key.parts = _Members()
            was_split = key.parts.is_shared
            part, is_new_part = key.parts.enter(model, 1.0)
            self._split += key.parts.is_shared and not was_split
            is_new = is_new or is_new_part
        self.version += is_new
        self._asker_of[request] = _Asker(name, key, model, part)

    def leave(self, request: RequestId) -> None:
        """A request ended."""
        asker = self._asker_of.pop(request, None)
        if asker is None:
            return
        parts = asker.key.parts
        if parts is not None:
            was_split = parts.is_shared
            self.version += parts.leave(asker.model)
            self._split -= was_split and not parts.is_shared
        self.version += self._keys.leave(asker.name)

    def key_of(self, request: RequestId) -> str:
        """Return the name of the key of a request that has not ended."""
        return self._asker_of[request].name

    def share_of(self, name: str, weight: float) -> float:
        """Return the part of everything that a key may have, among those that have requests."""
        others = (key.weight for other, key in self._keys.known.items() if other != name)
        return weight / (weight + sum(others))

    def charge(self, requests: Iterable[RequestId], took_s: float) -> None:
        """`requests` computed together for `took_s`."""
        if not self.is_shared:
            return
        askers = [self._asker_of[r] for r in requests if r in self._asker_of]
        for _, key, _, part in askers:
            if self._keys.is_shared:
                self._keys.charge(key, took_s / len(askers))
            if part is not None and key.parts is not None and key.parts.is_shared:
                key.parts.charge(part, took_s / len(askers))
        self.version += 1

    def ahead_s(self, request: RequestId) -> float:
        """Return how much more of the device its key has had than the one that has had least, and
        its model than that of the same key: in seconds, over their weights."""
        if not self.is_shared:
            return 0.0
        _, key, _, part = self._asker_of[request]
        ahead_s = key.had_s - self._keys.least_s()
        if part is not None and key.parts is not None:
            ahead_s += part.had_s - key.parts.least_s()
        return ahead_s

    def is_owed(self, request: RequestId, more_s: float) -> bool:
        """Whether some other key, or another model of its own, has had more by `more_s`, in the
        same measure: what is late of it is late for that."""
        if not self.is_shared:
            return False
        _, key, _, part = self._asker_of[request]
        others_s = self._keys.most_s() - key.had_s
        if part is not None and key.parts is not None:
            others_s = max(others_s, key.parts.most_s() - part.had_s)
        return others_s > more_s

    def worth(self, requests: Iterable[RequestId]) -> float:
        """Return what each of `requests` counts, on the average, where all of a key together count
        as much as its weight, and all of a model of it as those of each other; 1 where they count
        alike."""
        if not self.is_shared:
            return 1.0
        askers = [self._asker_of[request] for request in requests]
        if not askers:
            return 1.0
        total = sum(key.weight for key in self._keys.known.values()) / len(self._asker_of)
        return sum(map(_counts, askers)) / len(askers) / total


def _counts(asker: _Asker) -> float:
    key, part = asker.key, asker.part
    if part is None or key.parts is None:
        return key.weight / key.requests
    return key.weight / len(key.parts.known) / part.requests
