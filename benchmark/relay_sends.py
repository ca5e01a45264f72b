"""What sending itself takes: a process that knows each frame beforehand and only sends it.

No loop, no record, no text: at each tick one `send` a stream, in a thread of its own. What a relay
takes beyond this is the relay's; notes when each tick was.
"""

import selectors
import socket
import struct
import sys
import time
from pathlib import Path

import msgspec

from benchmark.relay_instance import Stamp
from benchmark.relay_peer import made_by

HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n"
)
ENDING = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
ASK_S, SEND_S = 60.0, 30
MOST_BYTES = 1 << 16


class SendOrders(msgspec.Struct, frozen=True, kw_only=True):
    """To send `frames` to `streams` clients, with `name`'s id made each stream's own; a tick, of
    one of the `groups` in turn, is every `step_s`; and where the stamps go."""

    frames: tuple[bytes, ...]
    name: str
    streams: int
    groups: int
    step_s: float
    port: int
    stamps: str


def accept(listening: socket.socket, count: int) -> list[socket.socket]:
    """Return as many connections, each behind its whole request and the head of its answer."""
    asked: dict[socket.socket, bytes] = {}
    ready: list[socket.socket] = []
    end_s = time.monotonic() + ASK_S
    with selectors.DefaultSelector() as selector:
        selector.register(listening, selectors.EVENT_READ)
        while len(ready) < count and time.monotonic() < end_s:
            for key, _ in selector.select(1.0):
                if key.fileobj is listening:
                    one, _ = listening.accept()
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    asked[one] = b""
                    selector.register(one, selectors.EVENT_READ)
                    continue
                one = key.fileobj  # type: ignore[assignment]
                part = one.recv(MOST_BYTES)
                asked[one] += part
                if part and not is_whole(asked[one]):
                    continue
                selector.unregister(one)
                if part:
                    ready.append(one)
                else:
                    one.close()  # who only looked whether we are up
    if len(ready) < count:
        raise TimeoutError(f"{len(ready)} of {count} requests came within {ASK_S:g} s")
    for one in ready:
        one.sendall(HEAD)
    return ready


def is_whole(request: bytes) -> bool:
    """Whether all of it is there."""
    head, found, body = request.partition(b"\r\n\r\n")
    _, _, length = head.lower().partition(b"content-length:")
    return bool(found) and len(body) >= int(length.split(b"\r\n")[0] or 0)


def send_all(orders: SendOrders, connections: list[socket.socket]) -> list[Stamp]:
    """Send the streams to their ends and return when their frames were due."""
    names = [
        f"{orders.name[: -len(str(number))]}{number}" for number in range(1, len(connections) + 1)
    ]
    known = orders.name.encode()
    counts = [0, *(made_by(frame) for frame in orders.frames)]
    stamps: list[Stamp] = []
    due_s = time.monotonic()
    for place, frame in enumerate(orders.frames):
        chunks = [
            b"%x\r\n%b\r\n" % (len(frame), frame.replace(known, name.encode())) for name in names
        ]
        position, made = counts[place], counts[place + 1] - counts[place]
        for group in range(orders.groups):
            due_s = max(due_s + orders.step_s, time.monotonic())
            time.sleep(due_s - time.monotonic())
            at_s = time.monotonic()
            for number in range(group, len(connections), orders.groups):
                connections[number].sendall(chunks[number])
            stamps += [
                Stamp(f"{name}.0", position, made, at_s) for name in names[group :: orders.groups]
            ]
    return stamps


def main() -> int:
    """Serve the streams once."""
    orders = msgspec.msgpack.decode(Path(sys.argv[1]).read_bytes(), type=SendOrders)
    with socket.create_server(("127.0.0.1", orders.port), backlog=4096) as listening:
        connections = accept(listening, orders.streams)
    for one in connections:
        # Of Python's own timeouts there is a system call before each send.
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_S, 0))
    stamps = send_all(orders, connections)
    Path(orders.stamps).write_bytes(msgspec.msgpack.encode(stamps))
    for one in connections:
        one.sendall(ENDING)
        one.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
