"""Sends a load on time, whatever the server does, and says how punctual it was itself.

No coordinated omission: a request leaves when it is due, not when an earlier one has ended, and
its latencies count from then.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from aegaeon.metrics import percentile
from benchmark.stream_client import Exchange, StreamClient

LOOK_S = 0.02  # how often the generator looks whether it is late
LEAD_S = 0.05  # before the first request is due


@dataclass(frozen=True)
class Punctuality:
    """The generator's own figures. Seconds late: requests behind the time they were due, and the
    loop, and with it the stamps of tokens, behind its timers."""

    send_p99_s: float
    send_max_s: float
    loop_p99_s: float
    cpu_s: float
    tokens: int

    @property
    def ceiling_tokens_per_s(self) -> float:
        """How many tokens this processor could have received, from what each of them took."""
        return self.tokens / self.cpu_s if self.cpu_s > 0 else 0.0


async def send_on_time(
    client: StreamClient,
    exchanges: Sequence[Exchange],
    patience_s: float,
    on_end: Callable[[Exchange], object] = lambda _: None,
) -> Punctuality:
    """Send `exchanges`, whose `due_s` count from now, and wait for their ends, `patience_s` after
    the last was due at most: then those that go on end as errors. Fills them in; their times are
    seconds of the monotonic clock from then on."""
    began_s = time.monotonic() + LEAD_S
    cpu_s = time.process_time()
    for exchange in exchanges:
        exchange.due_s += began_s
    lags: list[float] = []
    looking = asyncio.create_task(_look(lags))
    tasks: list[asyncio.Task[None]] = []
    try:
        for exchange in sorted(exchanges, key=lambda one: one.due_s):
            wait_s = exchange.due_s - time.monotonic()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            tasks.append(asyncio.create_task(_ask(client, exchange, on_end)))
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=patience_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        looking.cancel()
    return Punctuality(
        *_late(one.begun_s - one.due_s for one in exchanges if one.begun_s),
        _late(lags)[0],
        time.process_time() - cpu_s,
        sum(len(one.token_times_s) for one in exchanges),
    )


async def _ask(
    client: StreamClient, exchange: Exchange, on_end: Callable[[Exchange], object]
) -> None:
    try:
        await client.ask(exchange)
    except asyncio.CancelledError:
        exchange.error = "timeout"
    on_end(exchange)


async def _look(lags: list[float]) -> None:
    while True:
        due_s = time.monotonic() + LOOK_S
        await asyncio.sleep(LOOK_S)
        lags.append(time.monotonic() - due_s)


def _late(values: Iterable[float]) -> tuple[float, float]:
    ordered = sorted(max(0.0, value) for value in values)
    return (percentile(ordered, 99), ordered[-1]) if ordered else (0.0, 0.0)
