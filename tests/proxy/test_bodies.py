"""Bodies that are on their way: bounded all together, and by key."""

import asyncio
import json
import socket
from contextlib import ExitStack, closing

import httpx
import pytest
from starlette.requests import Request

from aegaeon.memory.machine import resident_bytes
from aegaeon.proxy.bodies import MAX_BODIES, PER_KEY, Bodies
from aegaeon.proxy.failures import ApiError
from aegaeon.proxy.keys import checked_key, create_key
from tests.support.fake_instance import wait_until
from tests.support.proxy_server import Proxy, listening

LIMIT = 1000


class Client:
    """One that sends its body in parts, when told."""

    def __init__(self, bodies, key="", declared=None, max_bytes=LIMIT):
        self._parts = asyncio.Queue()
        headers = [(b"content-type", b"application/json")]
        if declared is not None:
            headers.append((b"content-length", b"%d" % declared))
        request = Request({"type": "http", "headers": headers}, self._parts.get)
        self.reading = asyncio.ensure_future(bodies.read(request, max_bytes, key))

    async def send(self, count, more_body=True):
        message = {"type": "http.request", "body": b"a" * count, "more_body": more_body}
        self._parts.put_nowait(message)
        for _ in range(5):
            await asyncio.sleep(0)

    async def end(self):
        await self.send(0, more_body=False)
        return await self.reading

    def assert_refused(self, status=429, code="queue_full"):
        error = self.reading.exception()
        assert isinstance(error, ApiError)
        assert (error.status, error.code) == (status, code)


def run(test):
    bodies = Bodies(lambda: LIMIT)
    asyncio.run(asyncio.wait_for(test(bodies), 30))
    assert bodies.taken_bytes == 0
    assert not bodies._by_key and not bodies._all.bodies


def test_one_alone_is_never_too_much():
    async def test(bodies):
        one = Client(bodies, key="a", max_bytes=5 * LIMIT)
        await one.send(4 * LIMIT)
        assert bodies.taken_bytes == 4 * LIMIT
        assert await one.end() == b"a" * 4 * LIMIT

    run(test)


def test_all_together_are_bounded_and_room_is_free_again():
    async def test(bodies):
        first, second, third = (Client(bodies) for _ in range(3))
        await first.send(600)
        await second.send(300)
        await third.send(101)
        third.assert_refused()
        await second.send(100)
        assert await first.end() == b"a" * 600
        fourth = Client(bodies)
        await fourth.send(600)
        assert len(await second.end()) == 400
        assert len(await fourth.end()) == 600

    run(test)


def test_what_is_declared_is_refused_before_any_of_it_is_read():
    async def test(bodies):
        first = Client(bodies)
        await first.send(600)
        second = Client(bodies, declared=500)
        await asyncio.wait({second.reading})
        second.assert_refused()
        third = Client(bodies, declared=LIMIT + 1)
        await asyncio.wait({third.reading})
        third.assert_refused(413, "request_too_large")
        await first.end()

    run(test)


def test_a_key_leaves_something_for_others():
    async def test(bodies):
        first, second, other = Client(bodies, "a"), Client(bodies, "a"), Client(bodies, "b")
        await first.send(int(LIMIT * PER_KEY))
        await second.send(1)
        second.assert_refused()
        await other.send(200)
        assert len(await other.end()) == 200
        await first.end()

    run(test)


def test_bodies_are_bounded_in_number():
    async def test(bodies):
        mine = [Client(bodies, "a") for _ in range(int(MAX_BODIES * PER_KEY) + 1)]
        await asyncio.wait({mine[-1].reading})
        mine[-1].assert_refused()
        others = [Client(bodies, "b") for _ in range(MAX_BODIES - len(mine) + 1)]
        await others[0].send(1)
        last = Client(bodies, "c")
        await asyncio.wait({last.reading})
        last.assert_refused()
        for one in (*mine[:-1], *others):
            await one.end()

    run(test)


@pytest.mark.parametrize("ending", ["cancelled", "gone"])
def test_what_is_given_up_leaves_its_room(ending):
    async def test(bodies):
        first, second = Client(bodies), Client(bodies)
        await first.send(600)
        if ending == "cancelled":
            first.reading.cancel()
        else:
            first._parts.put_nowait({"type": "http.disconnect"})
        await asyncio.wait({first.reading})
        assert bodies.taken_bytes == 0
        await second.send(900)
        await second.end()

    run(test)


def test_what_is_on_its_way_when_the_server_stops_is_refused():
    async def test(bodies):
        one = Client(bodies)
        await one.send(600)
        bodies.refuse()
        await asyncio.wait({one.reading})
        one.assert_refused(503, "draining")

    run(test)


def test_bodies_sent_but_for_the_last_byte_take_no_more_than_there_may_be(tmp_path):
    file = tmp_path / "keys.json"
    secrets = [create_key(file, checked_key({"name": name})) for name in ("flood", "other")]
    proxy = Proxy(tmp_path, max_open_mb=64, keys_file=str(file))
    ask = {"model": "m", "prompt": "x", "max_tokens": 3}
    body = json.dumps({**ask, "user": "a" * (2 << 20)}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Authorization: Bearer %s\r\n" % secrets[0].encode()
    head += b"Content-Length: %d\r\n\r\n" % len(body)
    with listening(proxy) as url, ExitStack() as stack:
        before, room = resident_bytes(), proxy.app.state.bodies
        refused = 0
        for _ in range(60):
            one = stack.enter_context(
                closing(socket.create_connection(("127.0.0.1", httpx.URL(url).port), 30))
            )
            taken = room.taken_bytes
            one.sendall(head + body[:-1])
            if taken + len(body) > 16e6 * PER_KEY:
                assert b" 429 " in one.recv(1 << 16)
                refused += 1
            else:
                wait_until(lambda taken=taken: room.taken_bytes == taken + len(body) - 1)
        assert refused > 50
        assert resident_bytes() - before < 64e6
        mine = {"Authorization": f"Bearer {secrets[1]}"}
        assert httpx.post(f"{url}/v1/completions", json=ask, headers=mine, timeout=30).is_success
    wait_until(lambda: room.taken_bytes == 0)
