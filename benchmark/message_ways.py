"""Ways for messages between two nodes that share a Redis server, behind one small interface, and
the other node: a process that answers."""

import itertools
import multiprocessing
import multiprocessing.connection
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import redis

from aegaeon.errors import RingClosed, RingFull
from aegaeon.store.redis import RedisDomain

HERE, THERE = "here", "there"
WAIT_S = 30.0
BLOCK_MS = 1000
LEASE_S = 10.0  # as by default: by it goes how long answers are waited for
KEPT = 10_000  # records of a bare stream, about
ANSWER, NONE = b"A", b"N"  # what a record begins with: whether it is to be answered

Connection = multiprocessing.connection.Connection


class Way(ABC):
    """One end: messages go to the other and come from there. Each end is used by one process."""

    @abstractmethod
    def send(self, record: bytes) -> None:
        """Send; whether it has arrived is not known yet."""

    @abstractmethod
    def receive(self) -> list[bytes]:
        """Wait for records and return at least one."""

    @abstractmethod
    def close(self) -> None:
        """Let go."""


class MailboxWay(Way):
    """Two RedisMailboxes."""

    def __init__(self, url: str, name: str, end: str) -> None:
        """Open this end; the other one may come later."""
        self._domain = RedisDomain(name, url, lease_s=LEASE_S, holds_lease=True)
        self._inbox = self._domain.create_mailbox(end)
        other = THERE if end == HERE else HERE
        give_up_s = time.monotonic() + WAIT_S
        while True:
            try:
                self._outbox = self._domain.open_mailbox(other)
                return
            except RingClosed:
                if time.monotonic() > give_up_s:
                    raise
                time.sleep(0.01)

    def send(self, record: bytes) -> None:
        """See Way."""
        while True:
            try:
                self._outbox.send(record, WAIT_S)
                return
            except RingFull:
                continue

    def receive(self) -> list[bytes]:
        """See Way."""
        return self._inbox.receive(WAIT_S)

    def close(self) -> None:
        """See Way."""
        self._domain.close()


class StreamWay(Way):
    """Bare XADD and XREAD of redis-py: nothing is bounded, resumed or told apart."""

    def __init__(self, url: str, name: str, end: str) -> None:
        """Open this end."""
        self._client = redis.Redis.from_url(url)
        self._inbox = f"{name}:{end}"
        self._outbox = f"{name}:{THERE if end == HERE else HERE}"
        self._last: Any = "0-0"

    def send(self, record: bytes) -> None:
        """See Way."""
        self._client.xadd(self._outbox, {"r": record}, maxlen=KEPT)

    def receive(self) -> list[bytes]:
        """See Way."""
        answer: Any = []
        while not answer:
            answer = self._client.xread({self._inbox: self._last}, block=BLOCK_MS)
        entries = answer[self._inbox.encode()][0] if isinstance(answer, dict) else answer[0][1]
        self._last = entries[-1][0]
        return [fields[b"r"] for _, fields in entries]

    def close(self) -> None:
        """See Way."""
        self._client.delete(self._inbox)
        self._client.close()


class PublishWay(Way):
    """PUBLISH and SUBSCRIBE of redis-py: whoever does not listen just then misses it."""

    def __init__(self, url: str, name: str, end: str) -> None:
        """Open this end."""
        self._client = redis.Redis.from_url(url)
        self._heard = self._client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
        self._heard.subscribe(f"{name}:{end}")
        self._heard.get_message(timeout=WAIT_S)  # that it listens
        self._outbox = f"{name}:{THERE if end == HERE else HERE}"

    def send(self, record: bytes) -> None:
        """See Way."""
        self._client.publish(self._outbox, record)

    def receive(self) -> list[bytes]:
        """See Way."""
        while True:
            message = self._heard.get_message(timeout=WAIT_S)
            if message is not None:
                return [message["data"]]

    def close(self) -> None:
        """See Way."""
        self._heard.close()
        self._client.close()


class SocketWay(Way):
    """One TCP connection, without a server between."""

    def __init__(self, address: str, name: str, end: str) -> None:  # noqa: ARG002  as the others
        """Connect `THERE` to whoever listens at host:port; `HERE` has been listening."""
        if end == HERE:
            raise ValueError("the end here is made of a listening socket: `of`")
        host, _, port = address.rpartition(":")
        self._take(socket.create_connection((host, int(port)), timeout=WAIT_S))

    @classmethod
    def of(cls, listening: socket.socket) -> "SocketWay":
        """Take the connection that has come."""
        way = cls.__new__(cls)
        listening.settimeout(WAIT_S)
        way._take(listening.accept()[0])
        return way

    def send(self, record: bytes) -> None:
        """See Way."""
        self._socket.sendall(len(record).to_bytes(4, "little") + record)

    def receive(self) -> list[bytes]:
        """See Way."""
        length = self._file.read(4)
        if len(length) < 4:
            raise EOFError
        return [self._file.read(int.from_bytes(length, "little"))]

    def close(self) -> None:
        """See Way."""
        self._file.close()
        self._socket.close()

    def _take(self, connected: socket.socket) -> None:
        connected.settimeout(WAIT_S)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._file = connected, connected.makefile("rb")


OURS, STREAM, PUBLISH, SOCKET = "RedisMailbox", "XADD, XREAD", "PUBLISH", "a bare socket"
WAYS: dict[str, Callable[[str, str, str], Way]] = {
    OURS: MailboxWay,
    STREAM: StreamWay,
    PUBLISH: PublishWay,
    SOCKET: SocketWay,
}


class Pair:
    """This node, and the other one as a process, which answers by when it had each record."""

    def __init__(self, kind: str, url: str, name: str) -> None:
        """Start the other node, and open this end."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        listening = socket.create_server(("127.0.0.1", 0)) if kind == SOCKET else None
        address = f"127.0.0.1:{listening.getsockname()[1]}" if listening is not None else url
        self._process = context.Process(target=_answer, args=(kind, address, name, theirs))
        self._process.start()
        theirs.close()
        self._way = SocketWay.of(listening) if listening else WAYS[kind](address, name, HERE)
        if listening is not None:
            listening.close()
        assert ours.recv() == "ready"
        self._numbers = itertools.count()

    def ping(self, size: int) -> tuple[float, float]:
        """Send a record of `size` bytes; return the seconds until it was there, and until the
        answer was here."""
        began_ns = time.perf_counter_ns()
        self._way.send(ANSWER + bytes(size - 1))
        (answer,) = self._way.receive()
        ended_ns = time.perf_counter_ns()
        return (int.from_bytes(answer[1:9], "little") - began_ns) / 1e9, (ended_ns - began_ns) / 1e9

    def flood_s(self, count: int, size: int) -> float:
        """Send `count` records as fast as they go; return the seconds until all were there."""
        record = NONE + bytes(size - 1)
        began_s = time.perf_counter()
        for _ in range(count - 1):
            self._way.send(record)
        self._way.send(ANSWER + bytes(size - 1))
        self._way.receive()
        return time.perf_counter() - began_s

    def close(self) -> None:
        """End the other node, and this end."""
        self._way.send(b"")
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._way.close()


def _answer(kind: str, address: str, name: str, ready: "Connection[Any, Any]") -> None:
    way = WAYS[kind](address, name, THERE)
    ready.send("ready")
    while True:
        for record in way.receive():
            if not record:
                way.close()
                return
            if record[:1] == ANSWER:
                now = time.perf_counter_ns().to_bytes(8, "little")
                way.send(NONE + now + record[9:])
