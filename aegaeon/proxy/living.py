"""Which open requests live at which life of an instance."""

from collections.abc import Set

from aegaeon.proxy.generation import OpenRequest
from aegaeon.proxy.outbox import Target
from aegaeon.types import RequestId


class Living:
    """The requests by where they live, which is their `target`. Owned by the gateway."""

    def __init__(self) -> None:
        self._at: dict[Target, dict[RequestId, OpenRequest]] = {}

    @property
    def targets(self) -> Set[Target]:
        """Where any request lives."""
        return self._at.keys()

    def at(self, target: Target) -> tuple[OpenRequest, ...]:
        """Return the requests that live there."""
        return tuple(self._at.get(target, {}).values())

    def attach(self, opened: OpenRequest, target: Target) -> None:
        """Put the request on the list of the instance where it lives."""
        opened.target = target
        self._at.setdefault(target, {})[opened.id] = opened

    def detach(self, opened: OpenRequest) -> Target | None:
        """Take the request off its instance's list and return that instance's life."""
        target = opened.target
        if target is None:
            return None
        opened.target = None
        rest = self._at[target]
        del rest[opened.id]
        if not rest:
            del self._at[target]
        return target
