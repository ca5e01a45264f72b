"""The line for KV: who may prefill when there is not enough of it for everyone.

The group that ran out of it first is the only one to prefill until it has its share. Where nobody
here could give up any, others hold it all, or the system has no memory left: then time must tell.
"""

from collections.abc import Iterable, Mapping
from typing import TypeVar

from aegaeon.scheduler.groups import Group
from aegaeon.types import ModelId

GroupT = TypeVar("GroupT", bound=Group)


class KvLine:
    """Looks at the groups of a scheduler, and keeps what they note of KV."""

    def __init__(self, groups: Mapping[ModelId, Group]) -> None:
        self._groups = groups
        self._stalled: dict[ModelId, Group] = {}
        self._tickets = 0

    def freed(self) -> None:
        """A sequence has given up KV: it is worth trying again."""
        for group in self._stalled.values():
            group.kv_freed = True
            group.kv_retry.reset()

    def is_held(self) -> bool:
        """Whether any sequence has KV that it may give up later."""
        return any(g.running or g.leaving or g.begun for g in self._groups.values())

    def join(self, groups: Iterable[Group], now: float) -> None:
        """Put `groups` in line, those behind that are not in it yet."""
        is_held = self.is_held()
        for group in groups:
            if group.kv_ticket is None:
                self._tickets += 1
                group.kv_ticket = self._tickets
                self._stalled[group.model] = group
            group.kv_freed = False
            if not is_held:
                group.kv_retry.fail(now)

    def leave(self, group: Group) -> None:
        """Nothing of `group` lacks KV."""
        group.kv_ticket = None
        group.kv_retry.reset()
        self._stalled.pop(group.model, None)

    def first(self) -> Group | None:
        """The group whose turn it is to try for KV, or None when nobody lacks it."""
        if not self._stalled:
            return None
        return min(self._stalled.values(), key=lambda group: group.kv_ticket or 0)

    def may_prefill(self, group: Group, now: float) -> bool:
        """Whether a prefill of `group` may find KV."""
        first = self.first()
        if first is None:
            return True
        if group is not first:
            return False
        return group.kv_freed or (group.kv_retry.at_s <= now and not self.is_held())

    def next_retry_s(self, now: float) -> float | None:
        """When to try again though nobody here gives up KV."""
        first = self.first()
        if first is None or first.kv_retry.at_s <= now or self.is_held():
            return None
        return first.kv_retry.at_s

    def runnable(self, active: Mapping[ModelId, GroupT], now: float) -> Mapping[ModelId, GroupT]:
        """Those of `active` that could make progress, were their model on the device."""
        if not self._stalled:
            return active
        return {
            model: group
            for model, group in active.items()
            if group.running or group.begun or self.may_prefill(group, now)
        }
