"""What is sent without a task waiting for it: at once where the server takes it, else later."""

import asyncio

import pytest

from aegaeon.proxy.choices import Choices
from aegaeon.proxy.outlet import Outlet
from aegaeon.proxy.streams import Relay
from aegaeon.types import TokenEvent
from tests.proxy.test_waits import GENERATION, Source, transcript


class Server:
    """Takes messages as an ASGI server does: while `slow`, its `send` waits before it takes one."""

    def __init__(self):
        self.taken = []
        self.unwound = 0
        self._free = asyncio.Event()
        self._free.set()

    async def send(self, message):
        try:
            await self._drain()
            self.taken.append(message)
        finally:
            self.unwound += 1

    async def _drain(self):
        while not self._free.is_set():
            await self._free.wait()
            await asyncio.sleep(0)  # a bare turn of the loop is waited for, too

    def pause(self):
        self._free.clear()

    def resume(self):
        self._free.set()


def run(test):
    asyncio.run(asyncio.wait_for(test, 20))


def test_what_the_server_takes_at_once_needs_no_task():
    async def test():
        server = Server()
        outlet = Outlet(server.send)
        asyncio.get_running_loop().call_soon(lambda: outlet.begin({"body": b"a"}))
        await asyncio.sleep(0.01)
        assert (server.taken, outlet.is_waiting) == ([{"body": b"a"}], False)

    run(test())


def test_what_a_slow_client_does_not_take_is_finished_by_a_task():
    async def test():
        server = Server()
        outlet = Outlet(server.send)
        server.pause()
        assert not outlet.begin({"body": b"a"})
        sending = asyncio.create_task(outlet.send({"body": b"b"}))
        await asyncio.sleep(0.01)
        assert server.taken == [] and outlet.is_waiting
        server.resume()
        await sending
        assert server.taken == [{"body": b"a"}, {"body": b"b"}] and not outlet.is_waiting

    run(test())


@pytest.mark.parametrize("is_awaited", [True, False])
def test_what_is_given_up_is_unwound(is_awaited):
    async def test():
        server = Server()
        outlet = Outlet(server.send)
        server.pause()
        outlet.begin({"body": b"a"})
        if is_awaited:
            finishing = asyncio.create_task(outlet.finish())
            await asyncio.sleep(0.01)
            finishing.cancel()
            await asyncio.gather(finishing, return_exceptions=True)
        outlet.close()
        outlet.close()
        server.resume()
        await asyncio.sleep(0.01)
        assert (server.taken, server.unwound, outlet.is_waiting) == ([], 1, False)

    run(test())


class Feed:
    """A relay of one choice whose tokens come when they are told to."""

    def __init__(self, frames=lambda piece: piece.text.encode()):
        self.server, self.source = Server(), Source()
        self._frames = frames
        self._position = 0

    async def relay(self):
        loop = asyncio.get_running_loop()
        async with Choices(self.source, [GENERATION], [transcript()]) as choices:
            outlet = Outlet(self.server.send)
            await Relay(choices, outlet, self._frames, loop.time() + 9).run(None)

    def token(self, finish_reason=None):
        event = TokenEvent("r", 0, self._position, (65 + self._position,), "i", finish_reason)
        self._position += 1
        self.source.opened.take_in(event, 0.0)

    @property
    def bodies(self):
        return [message["body"] for message in self.server.taken]


def test_tokens_are_sent_where_they_come_in_and_gathered_for_a_slow_client():
    async def test():
        feed = Feed()
        relaying = asyncio.create_task(feed.relay())
        await asyncio.sleep(0.01)
        feed.token()
        assert feed.bodies == [b"A"]  # no task has had a turn
        feed.server.pause()
        for _ in range(3):
            feed.token()
            await asyncio.sleep(0.01)
        assert feed.bodies == [b"A"]
        feed.server.resume()
        await asyncio.sleep(0.01)
        assert feed.bodies == [b"A", b"B", b"CD"]
        feed.token("length")
        await relaying
        assert b"".join(feed.bodies) == b"ABCDE"

    run(test())


def test_an_error_where_tokens_come_in_is_the_streams_own():
    def frames(piece):
        if piece.text == "B":
            raise RuntimeError("no frame")
        return piece.text.encode()

    async def test():
        feed = Feed(frames)
        relaying = asyncio.create_task(feed.relay())
        await asyncio.sleep(0.01)
        feed.token()
        feed.token()
        feed.token()
        with pytest.raises(RuntimeError, match="no frame"):
            await relaying
        assert feed.bodies == [b"A"]

    run(test())
