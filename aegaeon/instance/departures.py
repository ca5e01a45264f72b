"""Prefilled requests on their way to an instance that decodes: offered, answered, taken back.

The sending side of a hand-off. An offer ends at a time that it names; until then, and a little
longer, its KV stays as it is here, so a late taker never finds another sequence's blocks.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from aegaeon.clocks import ahead_s
from aegaeon.errors import (
    Draining,
    HandoffLost,
    KvUnreachable,
    OutOfBlocks,
    Overloaded,
    RecordTooLarge,
    StoreUnavailable,
)
from aegaeon.handles import KvStream
from aegaeon.instance.outbox import Outbox
from aegaeon.instance.ways import OFFER_S, Ways
from aegaeon.types import (
    Accepted,
    Cancel,
    Declined,
    Instance,
    InstanceId,
    InstanceRecord,
    KvHandle,
    ModelId,
    Request,
    RequestId,
    Transfer,
)

log = logging.getLogger(__name__)

GRACE_S = 1.0  # a taker that began while its offer stood may take this long over it
LOOK_S = 0.1  # between looks whether the taker of an unanswered offer still lives
RETRY_S = 0.05  # while nobody takes the first in line
MAX_MOVES = 4096  # remembered, for a cancel that comes after the request has gone
_TRY_OTHERS = {Overloaded.code, OutOfBlocks.code, Draining.code}

Failure = tuple[str, str]  # code and message
OnEnd = Callable[[Request, Failure | None, float], None]
OnStays = Callable[[Request, float], None]
# Names the KV of a request, by memory that all instances reach where that is asked for.
HandOver = Callable[[bool], KvHandle]


class Ends(NamedTuple):
    """Called once for each request begun: `on_end` when it has gone, was cancelled or (with a
    failure) cannot go, and only then may its KV be released; or `on_stays` when nobody takes one
    that may stay, which goes on here."""

    on_end: OnEnd
    on_stays: OnStays


class _Offer(NamedTuple):
    instance: InstanceId
    address: str  # another one in each of the instance's lives
    expires_s: float
    stream: KvStream | None  # by which its KV goes to another node
    is_near: bool  # its taker shares our memory


@dataclass(slots=True)
class _Departure:
    request: Request
    kv: KvHandle
    hand_over: HandOver
    may_stay: bool
    offer: _Offer | None = None
    look_at_s: float = 0.0
    refused: set[InstanceId] = field(default_factory=set)
    is_wanted: bool = True
    is_withdrawn: bool = False


class Departures:
    """Owned by one runtime, which is told how each departure ends."""

    def __init__(
        self,
        record: InstanceRecord,
        outbox: Outbox,
        table: Callable[[], tuple[Instance, ...]],
        ways: Ways,
        ends: Ends,
    ) -> None:
        """`record` is this instance's; `table` returns the others' rows."""
        self._record = record
        self._ways = ways
        self._outbox = outbox
        self._table = table
        self._ends = ends
        self._departures: dict[RequestId, _Departure] = {}  # the first in line first
        self._moves: OrderedDict[RequestId, tuple[int, str]] = OrderedDict()
        self._retry_at_s = float("-inf")

    def __contains__(self, request: RequestId) -> bool:
        """Whether the departure of `request` has not ended."""
        return request in self._departures

    @property
    def is_empty(self) -> bool:
        """Whether no departure is under way."""
        return not self._departures

    def begin(self, request: Request, hand_over: HandOver, may_stay: bool = False) -> None:
        """Let `request` (with its tokens so far) go, once these have left for its proxy;
        `hand_over` names its KV, again where that has to be. One that `may_stay` does not wait for
        somebody to come who takes it."""
        assert request.id not in self._departures
        kv = hand_over(False)
        self._departures[request.id] = _Departure(request, kv, hand_over, may_stay)

    def cancel(self, request: RequestId, now: float) -> None:
        """Nobody waits for `request`; an offer of it is withdrawn."""
        departure = self._departures.get(request)
        if departure is None:
            return
        departure.is_wanted = False
        if departure.offer is None:
            self._end(departure, None, now)
        else:
            self._withdraw(departure)

    def forward_cancel(self, cancel: Cancel) -> None:
        """Send a cancel after the request it is for, if that has gone from here."""
        attempt, address = self._moves.get(cancel.request_id, (0, None))
        if address is not None and cancel.covers(attempt):
            # Once: it may have come back and gone again, and each would send it to the other.
            del self._moves[cancel.request_id]
            self._outbox.post(address, cancel)

    def on_answer(self, answer: Accepted | Declined, now: float) -> None:
        """Learn what became of an offer; an answer to another offer is ignored."""
        departure = self._departures.get(answer.request_id)
        if departure is None or departure.request.attempt != answer.attempt:
            return
        if departure.offer is None or departure.offer.instance != answer.instance:
            return
        match answer:
            case Accepted():
                self._remember(departure.request, departure.offer.address)
                self._end(departure, None, now)
            case Declined(code=code, message=message):
                log.info(
                    "declined request=%s by=%s: %s", answer.request_id, answer.instance, message
                )
                if code == KvUnreachable.code and departure.kv.device is not None:
                    self._take_back(departure, now, by_host=True)
                    departure.refused.discard(answer.instance)
                    return
                self._take_back(departure, now)
                if departure.is_wanted and code not in _TRY_OTHERS:
                    self._end(departure, (code, message), now)

    def on_gone(self, address: str, now: float) -> None:
        """Nobody receives at `address` any more, as far as we see: what was offered there was taken
        before, or not at all. On our node another one can try; if the KV is gone it prefills
        again."""
        for departure in tuple(self._departures.values()):
            if departure.offer is not None and departure.offer.address == address:
                self._give_up(departure, now)

    def due_s(self) -> float | None:
        """When to call `advance` at the latest."""
        dues: list[float] = []
        for departure in self._departures.values():
            if departure.offer is not None:
                dues.append(departure.look_at_s)
            elif not self._outbox.is_pending(departure.request.reply_to):
                dues.append(self._retry_at_s)
        return min(dues, default=None)

    def advance(self, now: float) -> bool:
        """Offer what is in line and look after open offers; say whether something was posted."""
        line = [d for d in self._departures.values() if self._is_in_line(d, now)]
        open_offers = [
            d for d in self._departures.values() if d.offer is not None and d.look_at_s <= now
        ]
        if not line and not open_offers:
            return False
        try:
            rows = self._table()
        except StoreUnavailable as error:
            log.warning("table not readable error=%s", error)
            self._retry_at_s = now + LOOK_S
            for departure in open_offers:
                departure.look_at_s = now + LOOK_S
            return False
        for departure in open_offers:
            self._look_after(departure, rows, now)
        for departure in line:
            if not self._offer(departure, rows, now):
                # Those behind it wait, too: a large one would else never find room.
                self._retry_at_s = now + RETRY_S
                break
        return True

    def _is_in_line(self, departure: _Departure, now: float) -> bool:
        if departure.offer is not None or now < self._retry_at_s:
            return False
        # The next tokens come from elsewhere: those from here must be on their way before.
        return not self._outbox.is_pending(departure.request.reply_to)

    def _offer(self, departure: _Departure, rows: tuple[Instance, ...], now: float) -> bool:
        """Offer it to whom it suits best; say whether there was anybody."""
        request = departure.request
        able = {row.record.id: row for row in rows if row.record.id not in departure.refused}
        taker = self._ways.choose(
            tuple(able.values()), self._record.node, request, departure.kv.kv_bytes, self._offered()
        )
        if taker is None and departure.may_stay:
            del self._departures[request.id]
            self._ends.on_stays(request, now)
            return True
        if taker is None:
            departure.refused.clear()
            return False
        row, kv, within_s, ahead = taker.row, departure.kv, OFFER_S, None
        if not taker.is_near:
            kv, within_s = self._ways.by_stream(request, row)
            ahead = ahead_s()
        offer = _Offer(row.record.id, row.record.mailbox, now + within_s, kv.stream, taker.is_near)
        far_s = None if taker.is_near else within_s
        transfer = Transfer(request, kv, self._record.mailbox, offer.expires_s, ahead, far_s)
        try:
            self._outbox.post(offer.address, transfer)
        except RecordTooLarge as error:
            self._ways.withdraw(offer.stream)
            self._end(departure, (error.code, str(error)), now)
            return True
        departure.offer = offer
        departure.look_at_s = now + LOOK_S
        departure.is_withdrawn = False
        return True

    def _offered(self) -> dict[InstanceId, Counter[ModelId]]:
        """What has been offered and not answered."""
        offered: dict[InstanceId, Counter[ModelId]] = {}
        for departure in self._departures.values():
            if departure.offer is not None:
                counts = offered.setdefault(departure.offer.instance, Counter())
                counts[departure.request.model] += 1
        return offered

    def _look_after(self, departure: _Departure, rows: tuple[Instance, ...], now: float) -> None:
        """An unanswered offer: is its taker dead, or its time over?"""
        offer = departure.offer
        assert offer is not None
        is_there = any(row.record.mailbox == offer.address for row in rows)
        departure.look_at_s = now + LOOK_S
        if now < offer.expires_s + GRACE_S:
            if not is_there:
                self._withdraw(departure)  # to the dead: then `on_gone` tells us at once
        elif is_there and departure.is_wanted:
            self._lose(departure, now)
        else:
            self._give_up(departure, now)

    def _give_up(self, departure: _Departure, now: float) -> None:
        """Its taker seems to be dead. One of another node may only be out of our sight: it may have
        all KV or prefill again, and this attempt must not be computed here as well."""
        assert departure.offer is not None
        if departure.is_wanted and not departure.offer.is_near:
            self._lose(departure, now)
        else:
            self._take_back(departure, now)

    def _lose(self, departure: _Departure, now: float) -> None:
        """Nobody knows where it is. No cancel: if its taker did take the request, its proxy knows,
        and goes on with it there."""
        assert departure.offer is not None
        message = f"{departure.offer.instance} did not answer in time; send it again"
        self._end(departure, (HandoffLost.code, message), now)

    def _withdraw(self, departure: _Departure) -> None:
        if departure.offer is not None and not departure.is_withdrawn:
            departure.is_withdrawn = True
            request = departure.request
            self._outbox.post(departure.offer.address, Cancel(request.id, request.attempt))

    def _take_back(self, departure: _Departure, now: float, by_host: bool = False) -> None:
        """The offer is over and not accepted."""
        assert departure.offer is not None
        departure.refused.add(departure.offer.instance)
        self._ways.withdraw(departure.offer.stream)
        departure.offer = None
        self._retry_at_s = min(self._retry_at_s, now)
        if not departure.is_wanted:
            self._end(departure, None, now)
        elif departure.kv.device is not None:
            # Named anew: who comes late to this offer keeps nothing of what it copied.
            departure.kv = departure.hand_over(by_host)

    def _end(self, departure: _Departure, failure: Failure | None, now: float) -> None:
        del self._departures[departure.request.id]
        if departure.offer is not None:
            self._ways.withdraw(departure.offer.stream)
        self._ends.on_end(departure.request, failure, now)

    def _remember(self, request: Request, address: str) -> None:
        self._moves[request.id] = (request.attempt, address)
        self._moves.move_to_end(request.id)
        if len(self._moves) > MAX_MOVES:
            self._moves.popitem(last=False)
