"""Requests that another instance has prefilled and offers: taken in with their KV, or declined."""

import logging
from collections import OrderedDict

from aegaeon.engine.base import Engine
from aegaeon.errors import AegaeonError, KvGone, Overloaded
from aegaeon.scheduler.base import Scheduler
from aegaeon.types import Accepted, Declined, InstanceId, RequestId, Transfer

log = logging.getLogger(__name__)

MAX_REMEMBERED = 4096


class Arrivals:
    """Owned by one runtime; makes engine and scheduler know what arrives, both or neither."""

    def __init__(self, instance: InstanceId, engine: Engine, scheduler: Scheduler) -> None:
        self._id = instance
        self._engine = engine
        self._scheduler = scheduler
        self._taken: OrderedDict[tuple[RequestId, int], None] = OrderedDict()

    def was_taken(self, transfer: Transfer) -> bool:
        """Whether this attempt has arrived here before, whatever has become of it since."""
        return (transfer.request.id, transfer.request.attempt) in self._taken

    def accepted(self, transfer: Transfer) -> Accepted:
        """The answer to a transfer that was taken."""
        return Accepted(transfer.request.id, transfer.request.attempt, self._id)

    def declined(self, transfer: Transfer, error: AegaeonError) -> Declined:
        """The answer to a transfer that was not taken."""
        request = transfer.request
        return Declined(request.id, request.attempt, self._id, error.code, str(error))

    def take(self, transfer: Transfer, now: float) -> Accepted | Declined:
        """Take the request in. Where its KV is gone it is prefilled again, here."""
        request = transfer.request
        if now >= transfer.expires_s:
            return self.declined(transfer, Overloaded("the offer came too late; offer it again"))
        try:
            self._scheduler.adopt(request, now)
            try:
                self._engine.adopt(request, transfer.kv)
            except KvGone as gone:
                log.info("prefilling again request=%s: %s", request.id, gone)
                self._scheduler.cancel(request.id, now)
                self._scheduler.submit(request, now)
                self._engine.submit(request)
        except AegaeonError as error:
            self._scheduler.cancel(request.id, now)
            return self.declined(transfer, error)
        self._taken[request.id, request.attempt] = None
        if len(self._taken) > MAX_REMEMBERED:
            self._taken.popitem(last=False)
        return self.accepted(transfer)
