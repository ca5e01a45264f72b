"""Whose weights and KV make room on a device for what is needed sooner."""

from collections.abc import Iterable
from typing import NamedTuple

from aegaeon.types import ModelId


class Holder(NamedTuple):
    """A model that holds memory: when it needs it next, from now on, and how much that is."""

    model: ModelId
    slack_s: float
    weight_bytes: int  # 0: only its KV is here
    kv_bytes: int


class Room(NamedTuple):
    """What makes room: weights to drop, and models whose KV goes to the host."""

    evict: tuple[ModelId, ...] = ()
    offload: tuple[ModelId, ...] = ()


def find_room(missing_bytes: int, holders: Iterable[Holder], above_s: float) -> Room | None:
    """Return what frees `missing_bytes`, of holders with more slack than `above_s` only, or None.

    Those needed last go first, weights before KV: dropping weights costs nothing now, KV has to be
    written to the host. Whoever need not go after all stays, those needed soonest first.
    """
    if missing_bytes <= 0:
        return Room()
    able = sorted(
        (holder for holder in holders if holder.slack_s > above_s),
        key=lambda holder: (-holder.slack_s, -holder.weight_bytes),
    )
    evicted: list[Holder] = []
    offloaded: list[Holder] = []
    for holder in able:
        if missing_bytes <= 0:
            break
        if holder.weight_bytes:
            evicted.append(holder)
            missing_bytes -= holder.weight_bytes
    for holder in able:
        if missing_bytes <= 0:
            break
        if holder.kv_bytes and (not holder.weight_bytes or holder in evicted):
            offloaded.append(holder)
            missing_bytes -= holder.kv_bytes
    if missing_bytes > 0:
        return None
    for holder in reversed(evicted.copy()):
        if missing_bytes + holder.weight_bytes <= 0 and holder not in offloaded:
            evicted.remove(holder)
            missing_bytes += holder.weight_bytes
    return Room(tuple(h.model for h in evicted), tuple(h.model for h in offloaded))
