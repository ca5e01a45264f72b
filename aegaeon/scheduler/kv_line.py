"""The line for KV: who may prefill when there is not enough of it for everyone.

The group that ran out of it first is the only one to prefill until it has its share.
"""

from collections.abc import Callable, Iterable, Mapping

from aegaeon.scheduler.groups import Group
from aegaeon.types import ModelId


class KvLine:
    """Looks at the groups of a scheduler, and keeps their `kv_ticket` and `kv_retry`."""

    def __init__(self, groups: Mapping[ModelId, Group]) -> None:
        self._groups = groups

    def freed(self) -> None:
        """A sequence has given up KV: it is worth trying again."""
        for group in self._groups.values():
            group.kv_retry = True

    def is_held(self) -> bool:
        """Whether any sequence has KV that it may give up later."""
        return any(group.running or group.leaving for group in self._groups.values())

    def join(self, groups: Iterable[Group], next_ticket: Callable[[], int]) -> None:
        """Put `groups` in line, those behind that are not in it yet."""
        for group in groups:
            if group.kv_ticket is None:
                group.kv_ticket = next_ticket()
            group.kv_retry = False

    def first(self) -> Group | None:
        """The group whose turn it is to try for KV, or None when nobody lacks it."""
        stalled = [g for g in self._groups.values() if g.kv_ticket is not None]
        return min(stalled, key=lambda group: group.kv_ticket or 0, default=None)

    def may_prefill(self, group: Group, first: Group | None) -> bool:
        """Whether a prefill of `group` may find KV, `first` being first in line."""
        if first is None:
            return True
        return group is first and (group.kv_retry or not self.is_held())

    def runnable(self) -> dict[ModelId, Group]:
        """Groups that could make progress, were their model on the device."""
        first = self.first()
        return {
            model: group
            for model, group in self._groups.items()
            if group.running or (group.waiting and self.may_prefill(group, first))
        }
