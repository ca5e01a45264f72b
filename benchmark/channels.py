"""Our mailbox and its peers behind one small interface, each with its sender in a process."""

import multiprocessing
import multiprocessing.connection
import multiprocessing.queues
import os
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from multiprocessing.context import SpawnContext
from pathlib import Path
from typing import Any

import zmq

from aegaeon.store.redis import RedisDomain
from aegaeon.store.shm import ShmDomain

SEND_PATIENCE_S = 60.0
Send = Callable[[bytes, Any], object]


class Channel(ABC):
    """A way for bytes from one process to another; the creating process receives."""

    @abstractmethod
    def address(self) -> Any:
        """Return what the sending process passes to `sender_of`."""

    @abstractmethod
    def receive(self) -> list[bytes]:
        """Wait for records and return at least one."""

    @abstractmethod
    def close(self) -> None:
        """Remove the channel."""


class RingChannel(Channel):
    """ShmMailbox."""

    def __init__(self) -> None:
        """Create a domain with one mailbox."""
        self._name = f"benchmark-{os.getpid()}"
        self._domain = ShmDomain(self._name)
        self._mailbox = self._domain.create_mailbox("box")

    def address(self) -> Any:
        """See Channel."""
        return "ring", self._name

    def receive(self) -> list[bytes]:
        """See Channel."""
        return self._mailbox.receive(10.0)

    def close(self) -> None:
        """See Channel."""
        self._domain.close()
        self._domain.unlink()


class RedisChannel(Channel):
    """RedisMailbox."""

    def __init__(self, url: str) -> None:
        """Create a domain with one mailbox on the server at `url`."""
        self._name, self._url = f"benchmark-{os.getpid()}", url
        self._domain = RedisDomain(self._name, url)
        self._mailbox = self._domain.create_mailbox("box")

    def address(self) -> Any:
        """See Channel."""
        return "redis", (self._name, self._url)

    def receive(self) -> list[bytes]:
        """See Channel."""
        return self._mailbox.receive(10.0)

    def close(self) -> None:
        """See Channel."""
        self._domain.unlink()
        self._domain.close()


class QueueChannel(Channel):
    """multiprocessing.Queue."""

    def __init__(self, context: SpawnContext) -> None:
        """Create a queue, bounded as the others are."""
        self._queue: multiprocessing.queues.Queue[bytes] = context.Queue(maxsize=1 << 14)

    def address(self) -> Any:
        """See Channel."""
        return "queue", self._queue

    def receive(self) -> list[bytes]:
        """See Channel."""
        return [self._queue.get(timeout=10.0)]

    def close(self) -> None:
        """See Channel."""
        self._queue.close()
        self._queue.join_thread()


class ZmqChannel(Channel):
    """ZeroMQ PUSH to PULL over ipc://."""

    def __init__(self) -> None:
        """Bind a socket in a directory of its own."""
        self._directory = tempfile.TemporaryDirectory(prefix="aegaeon-benchmark-")
        self._endpoint = f"ipc://{Path(self._directory.name) / 'socket'}"
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.bind(self._endpoint)
        self._socket.setsockopt(zmq.RCVTIMEO, 10_000)

    def address(self) -> Any:
        """See Channel."""
        return "zmq", self._endpoint

    def receive(self) -> list[bytes]:
        """See Channel."""
        return [self._socket.recv()]

    def close(self) -> None:
        """See Channel."""
        self._socket.close(linger=0)
        self._context.term()
        self._directory.cleanup()


class PipeChannel(Channel):
    """A bare pipe for single short records: what the machine takes to wake another process."""

    def __init__(self, context: SpawnContext) -> None:
        """Create it."""
        self._reader, self._writer = context.Pipe(duplex=False)

    def address(self) -> Any:
        """See Channel."""
        return "pipe", self._writer

    def receive(self) -> list[bytes]:
        """See Channel."""
        return [os.read(self._reader.fileno(), 64)]

    def close(self) -> None:
        """See Channel."""
        self._reader.close()
        self._writer.close()


class Sender:
    """A process that sends when told; each order is (records, bytes, gap_s)."""

    def __init__(self, context: SpawnContext, channel: Channel) -> None:
        """Start it and wait until it has connected."""
        self._orders, theirs = context.Pipe()
        self._process = context.Process(target=_send_on_order, args=(channel.address(), theirs))
        self._process.start()
        theirs.close()
        self._orders.recv()

    def order(self, records: int, record_bytes: int, gap_s: float = 0.0) -> None:
        """Have `records` sent, each beginning with its time of sending when there are gaps."""
        self._orders.send((records, record_bytes, gap_s))

    def close(self) -> None:
        """End the process."""
        self._orders.send(None)
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def sender_of(address: Any) -> tuple[Send, Any, Callable[[], object]]:
    """Return what to call with a record, its second argument to wait for room, and how to end."""
    kind, where = address
    match kind:
        case "ring":
            mailbox = ShmDomain(where).open_mailbox("box")
            return mailbox.send, SEND_PATIENCE_S, mailbox.close
        case "redis":
            domain = RedisDomain(*where)
            box = domain.open_mailbox("box")
            return box.send, SEND_PATIENCE_S, domain.close
        case "queue":
            return where.put, True, where.close
        case "pipe":
            return lambda record, file: os.write(file.fileno(), record), where, where.close
        case _:
            context = zmq.Context()
            socket = context.socket(zmq.PUSH)
            socket.connect(where)
            return socket.send, 0, context.destroy


def _send_on_order(address: Any, orders: "multiprocessing.connection.Connection[Any, Any]") -> None:
    send, waiting, close = sender_of(address)
    orders.send("connected")
    while (order := orders.recv()) is not None:
        records, record_bytes, gap_s = order
        record = bytes(record_bytes)
        if not gap_s:
            for _ in range(records):
                send(record, waiting)
            continue
        for _ in range(records):
            time.sleep(gap_s)
            send(time.perf_counter_ns().to_bytes(8, "little") + record[8:], waiting)
    close()
