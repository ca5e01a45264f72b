"""Which requests of an instance are to go on elsewhere, and whether anybody is there for them."""

import logging
from collections.abc import Callable, Collection, Iterable, Sequence

from aegaeon.errors import StoreUnavailable
from aegaeon.scheduler.dispatch import DECODING, PREFILLING
from aegaeon.scheduler.groups import Standing
from aegaeon.types import Instance, ModelId, RequestId, Role

log = logging.getLogger(__name__)

LOOK_S = 0.1  # between looks at who is there
AGAIN_S = 0.5  # before one that nobody took is offered again


class Evacuation:
    """Owned by one runtime. `table` returns the other instances' rows."""

    def __init__(self, table: Callable[[], tuple[Instance, ...]]) -> None:
        self._table = table
        self._rows: tuple[Instance, ...] = ()
        self._look_s = float("-inf")
        self._of_all = False
        self._again_s: dict[RequestId, float] = {}

    def begin(self) -> None:
        """All requests are to go."""
        self._of_all = True

    def due(
        self,
        requests: Iterable[tuple[RequestId, ModelId]],
        standing_of: Callable[[RequestId], Standing | None],
        leaving: Collection[ModelId],
        now: float,
    ) -> list[tuple[RequestId, bool]]:
        """Return which of `requests` go now, and whether they have KV: all where all are to go,
        else those of models that are `leaving`; with somebody there for them."""
        if not (self._of_all or leaving):
            return []
        due: list[tuple[RequestId, bool]] = []
        for request, model in requests:
            is_to_go = self._of_all or model in leaving
            if not is_to_go or now < self._again_s.get(request, float("-inf")):
                continue
            standing = standing_of(request)
            if standing not in ("running", "waiting"):
                continue  # on its way; or in the midst of its prompt, and to go when that is run
            has_kv = standing == "running"
            if self._has_taker(model, has_kv, now):
                due.append((request, has_kv))
        return due

    def note_stay(self, request: RequestId, now: float) -> None:
        """Nobody took `request`."""
        self._again_s = {r: at_s for r, at_s in self._again_s.items() if at_s > now}
        self._again_s[request] = now + AGAIN_S

    def _has_taker(self, model: ModelId, has_kv: bool, now: float) -> bool:
        """Whether somebody is there for a request of `model`, as of a moment ago."""
        if now - self._look_s >= LOOK_S:
            self._look_s = now
            try:
                self._rows = self._table()
            except StoreUnavailable as error:
                log.warning("table not readable error=%s", error)
                self._rows = ()
        return _is_served(self._rows, model, DECODING if has_kv else PREFILLING)


def _is_served(rows: Sequence[Instance], model: ModelId, roles: Sequence[Role]) -> bool:
    return any(
        row.status.state == "ready" and model in row.record.models and row.record.role in roles
        for row in rows
    )
