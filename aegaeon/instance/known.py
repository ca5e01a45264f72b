"""What is known, now and then, of how much of the requests that wait need not be run."""

from collections.abc import Iterable
from itertools import islice

from aegaeon.engine.base import Engine
from aegaeon.scheduler.base import Scheduler
from aegaeon.types import RequestId

LOOK_S = 0.1  # between looks at what is known of those that wait
MOST_LOOKED_AT = 32  # of these, the first ones: others will not be prefilled before the next look


class Known:
    """Owned by one runtime. Tells `scheduler` what `engine` knows: prefills have left more of what
    waits, or others have taken the room."""

    def __init__(self, engine: Engine, scheduler: Scheduler) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._look_at_s = float("-inf")

    def expire(self) -> None:
        """Look the next time it is asked: a prefill has ended."""
        self._look_at_s = float("-inf")

    def look_up(self, waiting: Iterable[RequestId], now: float) -> None:
        """Look, if it is time to, at those that are `waiting`, none of them in an action."""
        if now < self._look_at_s:
            return
        self._look_at_s = now + LOOK_S
        for request_id in islice(waiting, MOST_LOOKED_AT):
            self.note(request_id, now)

    def note(self, request_id: RequestId, now: float) -> None:
        """Look at this one."""
        self._scheduler.expect(request_id, self._engine.known_tokens(request_id), now)
