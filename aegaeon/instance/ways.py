"""By which ways requests go on elsewhere: to whom, and how their keys and values get there."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from aegaeon.engine.base import Engine
from aegaeon.handles import KvStream
from aegaeon.instance.kv_share import KvShare
from aegaeon.instance.pulls import Pulls
from aegaeon.scheduler.dispatch import LiveDispatcher
from aegaeon.scheduler.moving import Links, is_worth_moving, nearest
from aegaeon.types import Instance, InstanceId, KvHandle, ModelId, Request

OFFER_S = 2.0  # an offer may be taken this long, beside the time for KV to go to another node
MAX_OFFER_S = 25.0  # with that
LEAST_BYTES_PER_S = 20e6  # of a link by which KV is moved: what takes longer is given up
Unanswered = Mapping[InstanceId, Counter[ModelId]]


class Taker(NamedTuple):
    """Who is to take a request, and whether it shares this instance's memory."""

    row: Instance
    is_near: bool


@dataclass(slots=True)
class Ways:
    """Owned by one runtime. Without `share` and `pulls`, KV goes to no other node."""

    dispatcher: LiveDispatcher
    engine: Engine
    share: KvShare | None = None
    pulls: Pulls | None = None
    links: Links = field(default_factory=Links)

    def choose(
        self,
        rows: tuple[Instance, ...],
        node: str,
        request: Request,
        kv_bytes: int,
        offered: Unanswered,
    ) -> Taker | None:
        """Return who of `rows` takes a request with so much KV: the nearest that can."""
        for distance, able in enumerate(nearest(rows, node)):
            choice = self.dispatcher.dispatch_prefilled(able, request.model, kv_bytes, offered)
            if choice is not None:
                row = next(row for row in able if row.record.id == choice.instance)
                return Taker(row, distance == 0)
        return None

    def by_stream(self, request: Request, row: Instance) -> tuple[KvHandle, float]:
        """Name the KV of a request so that an instance on another node gets it, and say in how much
        time; or as nothing at all, where it is prefilled there again sooner."""
        nothing = KvHandle(owner=0, blocks=(), cached_tokens=0), OFFER_S
        exchange = self.engine.exchange
        exposed = None if exchange is None else exchange.expose(request.id)
        if self.share is None or exposed is None:
            return nothing
        kv, speed = exposed.kv, row.status.speeds.get(request.model)
        if not is_worth_moving(kv.kv_bytes, kv.cached_tokens, self.links.byte_s, speed):
            return nothing
        within_s = min(OFFER_S + kv.kv_bytes / LEAST_BYTES_PER_S, MAX_OFFER_S)
        stream = self.share.offer(exposed.views, within_s)
        return msgspec.structs.replace(kv, stream=stream), within_s

    def withdraw(self, stream: KvStream | None) -> None:
        """Nobody gets KV by `stream` any more; it may change from here on."""
        if stream is not None and self.share is not None:
            self.share.withdraw(stream)
