"""Which requests of an instance are to go on elsewhere, and whether anybody is there for them."""

import logging
from collections.abc import Callable, Collection, Iterable

from aegaeon.errors import StoreUnavailable
from aegaeon.scheduler.dispatch import DECODING, PREFILLING, is_able
from aegaeon.scheduler.groups import Standing
from aegaeon.scheduler.retries import Retry
from aegaeon.types import Instance, ModelId, RequestId

log = logging.getLogger(__name__)

LOOK_S = 0.1  # between looks at who is there
AGAIN_S = 0.5  # before one that nobody took is offered again; twice as long each time, up to
MOST_AGAIN_S = 8.0
# With KV: each may be copied to the host first, and whoever takes them has few connections.
MOST_AT_ONCE = 8


class Evacuation:
    """Owned by one runtime. `table` returns the other instances' rows."""

    def __init__(self, table: Callable[[], tuple[Instance, ...]]) -> None:
        self._table = table
        self._rows: tuple[Instance, ...] = ()
        self._look_s = float("-inf")
        self._of_all = False
        self._again: dict[RequestId, Retry] = {}

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
        else those of models that are `leaving`; with somebody there for them, and of those with KV
        some at a time."""
        if not (self._of_all or leaving):
            return []
        known = [(request, model, standing_of(request)) for request, model in requests]
        room = MOST_AT_ONCE - sum(standing == "leaving" for _, _, standing in known)
        due: list[tuple[RequestId, bool]] = []
        for request, model, standing in known:
            if not (self._of_all or model in leaving):
                continue
            if standing not in ("running", "waiting"):
                continue  # on its way; or in the midst of its prompt, and to go when that is run
            has_kv = standing == "running"
            again = self._again.get(request)
            if (has_kv and room <= 0) or (again is not None and now < again.at_s):
                continue
            if self._has_taker(model, has_kv, now):
                due.append((request, has_kv))
                room -= has_kv
        return due

    def note_stay(self, request: RequestId, now: float) -> None:
        """Nobody took `request`: it stood still for that, so it does so ever more seldom."""
        self._again = {r: one for r, one in self._again.items() if now < one.at_s + MOST_AGAIN_S}
        self._again.setdefault(request, Retry(AGAIN_S, MOST_AGAIN_S)).fail(now)

    def _has_taker(self, model: ModelId, has_kv: bool, now: float) -> bool:
        """Whether somebody is there for a request of `model`, as of a moment ago."""
        if now - self._look_s >= LOOK_S:
            self._look_s = now
            try:
                self._rows = self._table()
            except StoreUnavailable as error:
                log.warning("table not readable error=%s", error)
                self._rows = ()
        roles = DECODING if has_kv else PREFILLING
        return any(
            row.record.role in roles
            and is_able(row, model)
            and (row.status.kv_free_bytes > 0 or not has_kv)
            for row in self._rows
        )
