"""Why a request is where it is: this proxy's own choices, and questions to the instances.

Nobody waits for these but who asks: rings are bounded, and so is each wait.
"""

import asyncio
import itertools
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from aegaeon.errors import Overloaded
from aegaeon.explanations import At, Dispatched, Explained, is_of
from aegaeon.proxy.waits import within
from aegaeon.types import InstanceId, RequestId

MAX_DISPATCHED = 4096
MAX_OPEN = 2  # questions at a time, since answers go beside tokens
ANSWER_S = 2.0


class Asked(NamedTuple):
    """Who was asked something, and who had no room for it."""

    asked: frozenset[InstanceId]
    deaf: frozenset[InstanceId]


class Choices:
    """The last choices of this proxy. Callable from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ring: deque[Dispatched] = deque(maxlen=MAX_DISPATCHED)

    def note(self, dispatched: Dispatched) -> None:
        """Remember one."""
        with self._lock:
            self._ring.append(dispatched)

    def recent(self, request: RequestId | None, limit: int) -> tuple[Dispatched, ...]:
        """Return the last `limit`, of all requests or of one, the newest last."""
        with self._lock:
            ring = tuple(self._ring)
        return tuple(one for one in ring if request is None or is_of(one.request, request))[-limit:]


class Questions:
    """What instances have been asked and have not answered. Owned by one event loop."""

    def __init__(self) -> None:
        self._tickets = itertools.count()
        self._answers: dict[int, dict[InstanceId, Explained]] = {}
        self._came = asyncio.Event()

    def open(self) -> int:
        """Return the ticket of a new question; `close` it. Raises Overloaded."""
        if len(self._answers) >= MAX_OPEN:
            raise Overloaded(f"{MAX_OPEN} such questions are open; ask again later")
        ticket = next(self._tickets)
        self._answers[ticket] = {}
        return ticket

    async def put(
        self, ask: Callable[[int], Awaitable[Asked]], limit: int
    ) -> tuple[tuple[At, ...], tuple[InstanceId, ...]]:
        """Ask by `ask`, with a ticket; return the last `limit` decisions told, and who is silent.
        Raises Overloaded, and what `ask` raises."""
        ticket = self.open()
        try:
            sent = await ask(ticket)
            answers = await self.wait(ticket, sent.asked)
        finally:
            self.close(ticket)
        found = [At(one.instance, decision) for one in answers for decision in one.decisions]
        found.sort(key=lambda at: at.decision.at_s)
        silent = (sent.asked | sent.deaf) - {one.instance for one in answers}
        return tuple(found[-limit:]), tuple(sorted(silent))

    def close(self, ticket: int) -> None:
        """Forget a question; what comes later is dropped."""
        del self._answers[ticket]

    def take(self, answer: Explained) -> None:
        """An answer has come."""
        answers = self._answers.get(answer.ticket)
        if answers is not None:
            answers[answer.instance] = answer
            self._came.set()

    async def wait(self, ticket: int, asked: frozenset[InstanceId]) -> tuple[Explained, ...]:
        """Return the answers of `asked`, those that come within ANSWER_S."""
        answers = self._answers[ticket]
        give_up_s = asyncio.get_running_loop().time() + ANSWER_S
        while not asked <= answers.keys():
            left_s = give_up_s - asyncio.get_running_loop().time()
            if left_s <= 0:
                break
            self._came.clear()
            try:
                await within(left_s, self._came.wait())
            except asyncio.TimeoutError:
                break
        return tuple(answers.values())
