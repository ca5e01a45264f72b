"""The peer of the proxy's relay: a bare FastAPI route that streams prepared bytes at a pace.

All streams advance with one tick, as the sequences of a batch do. Notes when each frame was due.
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import uvicorn
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import StreamingResponse

from benchmark.relay_instance import Stamp


class PeerOrders(msgspec.Struct, frozen=True, kw_only=True):
    """What to stream: `opening` and `ending` around `frames`, whose ids are made `name`'s; how
    long a tick is, for so many `groups` of streams that take turns; and where the stamps go."""

    frames: tuple[bytes, ...]
    name: str
    groups: int
    step_s: float
    port: int
    stamps: str


class Ticks:
    """Wakes the streams of one group after the other, every `step_s` (0: at once)."""

    def __init__(self, groups: int, step_s: float) -> None:
        self._step_s = step_s
        self._events = [asyncio.Event() for _ in range(groups)]
        self._at_s = [0.0] * groups
        self._turn = 0

    async def run(self) -> None:
        """Tick until cancelled."""
        due_s = time.monotonic()
        while self._step_s > 0:
            due_s = max(due_s + self._step_s, time.monotonic())
            await asyncio.sleep(due_s - time.monotonic())
            woken, self._events[self._turn] = self._events[self._turn], asyncio.Event()
            self._at_s[self._turn] = time.monotonic()
            woken.set()
            self._turn = (self._turn + 1) % len(self._events)

    async def next(self, group: int) -> float:
        """Wait for the group's next tick and return when it was."""
        if self._step_s > 0:
            await self._events[group].wait()
            return self._at_s[group]
        await asyncio.sleep(0)  # the others' turn
        return time.monotonic()


def make_app(orders: PeerOrders) -> FastAPI:
    """Return the application: one route."""
    stamps: list[Stamp] = []
    counts = [made_by(frame) for frame in orders.frames]
    ticks = Ticks(orders.groups, orders.step_s)
    opened = 0

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        ticking = asyncio.create_task(ticks.run())
        yield
        ticking.cancel()
        Path(orders.stamps).write_bytes(msgspec.msgpack.encode(stamps))

    app = FastAPI(lifespan=lifespan)

    @app.post("/v1/completions")
    async def completions(request: Request) -> StreamingResponse:
        nonlocal opened
        await request.body()
        opened += 1
        return StreamingResponse(stream(opened), media_type="text/event-stream")

    async def stream(number: int) -> AsyncIterator[bytes]:
        identity = f"{orders.name[: -len(str(number))]}{number}"
        frames = [f.replace(orders.name.encode(), identity.encode()) for f in orders.frames]
        position = 0
        for frame, made in zip(frames, counts, strict=True):
            at_s = await ticks.next(number % orders.groups)
            stamps.append(Stamp(f"{identity}.0", position, made - position, at_s))
            position = made
            yield frame
        yield b"data: [DONE]\n\n"

    return app


def made_by(frame: bytes) -> int:
    """How many tokens there are with this frame, which says so."""
    chunk = msgspec.json.decode(frame.removeprefix(b"data: "))
    return int(chunk["usage"]["completion_tokens"])


def main() -> int:
    """Serve until SIGTERM, which lets the application write its stamps."""
    orders = msgspec.msgpack.decode(Path(sys.argv[1]).read_bytes(), type=PeerOrders)
    uvicorn.run(make_app(orders), port=orders.port, log_config=None, access_log=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
