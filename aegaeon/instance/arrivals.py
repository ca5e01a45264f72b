"""Requests that another instance has computed and offers: taken in with their KV, or declined. That
of another node has to come first, beside what computes here."""

import logging
from collections import OrderedDict
from collections.abc import Iterator

import msgspec

from aegaeon.clocks import brought_here
from aegaeon.engine.base import Engine
from aegaeon.engine.exchange import Room
from aegaeon.errors import AegaeonError, KvGone, Overloaded
from aegaeon.instance.departures import GRACE_S
from aegaeon.instance.pulls import Key, Pull, Pulls, key_of
from aegaeon.scheduler.base import Scheduler
from aegaeon.types import Accepted, Cancel, Declined, InstanceId, Transfer

log = logging.getLogger(__name__)

MAX_REMEMBERED = 4096


class Arrivals:
    """Owned by one runtime; makes engine and scheduler know what arrives, both or neither."""

    def __init__(
        self, instance: InstanceId, engine: Engine, scheduler: Scheduler, pulls: Pulls | None
    ) -> None:
        """Without `pulls`, KV of other nodes is prefilled again."""
        self._id = instance
        self._engine = engine
        self._scheduler = scheduler
        self._pulls = pulls
        self._taken: OrderedDict[Key, None] = OrderedDict()

    def was_taken(self, transfer: Transfer) -> bool:
        """Whether this move has ended here before, whatever has become of the request since."""
        return key_of(transfer.request) in self._taken

    def is_coming(self, transfer: Transfer) -> bool:
        """Whether the KV of this move is on its way."""
        return self._pulls is not None and key_of(transfer.request) in self._pulls

    def accepted(self, transfer: Transfer) -> Accepted:
        """The answer to a transfer that was taken."""
        return Accepted(transfer.request.id, transfer.request.attempt, self._id)

    def declined(self, transfer: Transfer, error: AegaeonError) -> Declined:
        """The answer to a transfer that was not taken."""
        request = transfer.request
        return Declined(request.id, request.attempt, self._id, error.code, str(error))

    def take(self, transfer: Transfer, now: float) -> Accepted | Declined | None:
        """Take the request in. Where its KV is gone it is prefilled again, here; None: its KV comes
        from another node, and `arrived` tells."""
        if now >= transfer.expires_s:
            return self.declined(transfer, Overloaded("the offer came too late; offer it again"))
        if transfer.kv.stream is None or self._pulls is None:
            return self._settle(transfer, now, None)
        try:
            self._pulls.begin(transfer, transfer.expires_s - now)
        except KvGone:
            return self._settle(transfer, now, None)
        except AegaeonError as error:
            return self.declined(transfer, error)
        return None

    def arrived(self) -> Iterator[Pull]:
        """Return those whose KV is on its way no more; each is to be settled or dropped."""
        return iter(()) if self._pulls is None else iter(self._pulls.done())

    def settle(self, pull: Pull, objection: AegaeonError | None, now: float) -> Accepted | Declined:
        """Take in what has arrived, if nothing speaks against it; what has not come whole is
        prefilled again, here, while its offer stands."""
        log.info(
            "kv came request=%s bytes=%d took_s=%.4f failure=%s",
            *(pull.transfer.request.id, pull.transfer.kv.kv_bytes, pull.took_s, pull.failure),
        )
        if pull.is_unwanted:
            objection = Overloaded("the offer was withdrawn")
        elif now >= pull.transfer.expires_s + GRACE_S:  # its sender has given it up
            objection = Overloaded("it was not taken in in time; offer it again")
        elif pull.failure and now >= pull.transfer.expires_s:
            objection = Overloaded("the KV did not come in time; offer it again")
        if objection is None and not pull.failure:
            return self._settle(pull.transfer, now, pull)
        self._drop(pull)
        if objection is not None:
            return self.declined(pull.transfer, objection)
        return self._settle(pull.transfer, now, None)

    def cancel(self, cancel: Cancel) -> None:
        """Nobody waits for a request that may be on its way."""
        if self._pulls is not None:
            self._pulls.cancel(cancel)

    def _drop(self, pull: Pull) -> None:
        assert self._pulls is not None
        self._pulls.free(pull)

    def _settle(self, transfer: Transfer, now: float, pull: Pull | None) -> Accepted | Declined:
        request = transfer.request
        try:
            self._scheduler.adopt(request, now)
            try:
                self._adopt(transfer, None if pull is None else pull.room)
            except KvGone as gone:
                log.info("prefilling again request=%s: %s", request.id, gone)
                if pull is not None:
                    self._drop(pull)
                    pull = None
                self._scheduler.cancel(request.id, now)
                self._scheduler.submit(request, now)
                self._engine.submit(request)
        except AegaeonError as error:
            self._scheduler.cancel(request.id, now)
            if pull is not None:
                self._drop(pull)
            return self.declined(transfer, error)
        self._taken[key_of(request)] = None
        if len(self._taken) > MAX_REMEMBERED:
            self._taken.popitem(last=False)
        return self.accepted(transfer)

    def _adopt(self, transfer: Transfer, room: Room | None) -> None:
        if room is None and transfer.kv.stream is not None:
            raise KvGone("it did not come from the other node")
        self._engine.adopt(transfer.request, transfer.kv, room)


def by_our_clock(transfer: Transfer, now: float) -> Transfer:
    """Return `transfer` with its times by this machine's clock. An offer of another node stands
    from `now` on: the clocks on two walls may differ by more than its time."""
    request = brought_here(transfer.request, transfer.ahead_s)
    expires_s = transfer.expires_s if transfer.within_s is None else now + transfer.within_s
    return msgspec.structs.replace(
        transfer, request=request, expires_s=expires_s, ahead_s=None, within_s=None
    )
