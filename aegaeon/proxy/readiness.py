"""Whether a request sent now would be served: looked at along the way that a request takes.

The table must be readable and each instance in it must answer a question by its mailbox, whose loop
it wakes like any message; the answer comes back as tokens do. Nothing is loaded or computed for it.
"""

import asyncio
import time

from aegaeon.config import Settings
from aegaeon.errors import AegaeonError, Overloaded
from aegaeon.proxy.answers import Ready
from aegaeon.proxy.gateway import Gateway
from aegaeon.scheduler.dispatch import can_serve

FRESH_S = 1.0  # for so long an answer is good for all who ask
TABLE_S = 5.0  # the table may be unreadable so long


class Readiness:
    """Owned by one event loop. However many ask, the instances are asked once a second."""

    def __init__(self, gateway: Gateway, settings: Settings) -> None:
        self._gateway = gateway
        self._wait_bound_s = settings.request_timeout_s / 2
        self._looking: asyncio.Task[Ready] | None = None
        self._looked_s = float("-inf")

    async def look(self) -> Ready:
        """Return what was found up to FRESH_S ago."""
        looking = self._looking
        if looking is None or (looking.done() and time.monotonic() - self._looked_s > FRESH_S):
            self._looking = looking = asyncio.create_task(self._look())
        # Shared by all who wait, and one of them may go away.
        return await asyncio.shield(looking)

    async def _look(self) -> Ready:
        reasons = [*self._of_process(), *self._of_instances(), *await self._unanswered()]
        oldest_s, model = max(
            ((one.oldest_wait_s, name) for name, one in self._gateway.meter.sums().models.items()),
            default=(0.0, ""),
        )
        if oldest_s > self._wait_bound_s:
            reasons.append(f"a request for {model} has waited {oldest_s:.0f} s for its first token")
        self._looked_s = time.monotonic()
        return Ready("unready" if reasons else "ready", tuple(reasons))

    def _of_process(self) -> list[str]:
        if self._gateway.is_broken:
            return ["the server has lost its mailbox; it must be started again"]
        age_s = self._gateway.table_age_s
        return [f"the table has not been readable for {age_s:.0f} s"] if age_s > TABLE_S else []

    def _of_instances(self) -> list[str]:
        rows = self._gateway.instances()
        reasons = [
            f"{row.record.id} is stuck and will be restarted"
            for row in rows
            if row.status.state == "stuck"
        ]
        if not can_serve(rows):
            states = ", ".join(f"{row.record.id} is {row.status.state}" for row in rows)
            reasons.append(f"no instance takes requests: {states or 'there is none'}")
        return reasons

    async def _unanswered(self) -> list[str]:
        try:
            found = await self._gateway.explain(None, None, 1)
        except Overloaded:
            return []  # others ask just now
        except AegaeonError as error:
            return [str(error)]
        live = {row.record.id for row in self._gateway.instances()}
        return [f"{name} does not answer" for name in found.silent if name in live]
