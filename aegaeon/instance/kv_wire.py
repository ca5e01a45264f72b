"""How keys and values go from one node to another: what both ends of a connection say.

The sender greets with MAGIC and a nonce; the receiver names an offer and proves, by a nonce of its
own and a code (HMAC-SHA-256), that it knows the token of that offer, which came by the store. From
then on each question and answer has a code under a key of both nonces, so nobody can alter, repeat
or ask. An answer to READ says how many bytes follow bare, and their checksum, which finds faults of
machines. The bytes are not hidden, nor guarded against who can alter them on their way.
"""

import hmac
import secrets
import socket
import struct
import time
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Literal

from aegaeon.errors import KvGone

MAGIC = b"aegkv\0\0\1"
NONCE_BYTES = 16
TOKEN_BYTES = 16
CODE_BYTES = 32
GREETING_S = 5.0  # for a connection to be made and greeted
IDLE_S = 5.0  # in which something has to come, or go
CHUNK_BYTES = 1 << 20  # the most in one answer, less than what the system holds for a connection:
WINDOW = 4  # so many are asked for ahead, and each end works on one while another is on its way
READ, TAKE = 1, 2  # questions: the bytes from here on; may I have it, now that I have them all
GIVEN, GONE = 1, 2  # answers

_NAME = struct.Struct(">Q")
_QUESTION = struct.Struct(">BQQ")  # what, from where on, how many bytes
_ANSWER = struct.Struct(">BQI")  # what, bytes that follow, their checksum


class Broken(Exception):
    """The other side is not who it should be, or says what makes no sense; ends the connection."""


class Line:
    """One side of a connection, one thread's alone. Raises Broken, and OSError for what the network
    does."""

    def __init__(self, connection: socket.socket, until_s: float) -> None:
        """Own `connection`; all of it is to be over by `until_s` of the monotonic clock."""
        self._socket, self._until_s = connection, until_s
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._key = b""
        self._counts = {b"ask": 0, b"say": 0}

    def send(self, *parts: bytes | memoryview) -> None:
        """Send all of `parts`, something each IDLE_S."""
        for part in parts:
            view = memoryview(part)
            while view:
                self._bound(IDLE_S)
                view = view[self._socket.send(view[:CHUNK_BYTES]) :]

    def fill(self, view: memoryview) -> None:
        """Receive into all of `view`, something each IDLE_S."""
        while view:
            self._bound(IDLE_S)
            count = self._socket.recv_into(view)
            if not count:
                raise Broken("the connection ended")
            view = view[count:]

    def exactly(self, size: int) -> bytes:
        """Receive so many bytes."""
        data = bytearray(size)
        self.fill(memoryview(data))
        return bytes(data)

    def agree(self, token: bytes, nonces: bytes) -> None:
        """Both know `token` and the nonces."""
        self._key = hmac.digest(token, MAGIC + nonces, "sha256")

    def tell(self, side: Literal[b"ask", b"say"], body: bytes) -> bytes:
        """Return `body` with its code, as the next that `side` says."""
        return body + self._code(side, body)

    def hear(self, side: Literal[b"ask", b"say"], form: struct.Struct) -> tuple[int, ...]:
        """Receive the next that `side` says."""
        text = self.exactly(form.size + CODE_BYTES)
        body = text[: form.size]
        if not hmac.compare_digest(self._code(side, body), text[form.size :]):
            raise Broken("it does not know the token of this offer")
        return form.unpack(body)

    def extend(self, until_s: float) -> None:
        """All is to be over by then."""
        self._until_s = until_s

    def close(self) -> None:
        """End the connection, also for a thread that waits on it."""
        with suppress(OSError):  # it has ended
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _code(self, side: Literal[b"ask", b"say"], body: bytes) -> bytes:
        number = self._counts[side]
        self._counts[side] += 1
        return hmac.digest(self._key, side + number.to_bytes(8, "big") + body, "sha256")

    def _bound(self, most_s: float) -> None:
        left_s = self._until_s - time.monotonic()
        if left_s <= 0.0:
            raise TimeoutError("it takes too long")
        self._socket.settimeout(min(most_s, left_s))


def greet(line: Line) -> tuple[int, bytes, bytes]:
    """The sender's greeting: return which offer the other side names, the nonces, and the code by
    which it proves to know its token."""
    own = secrets.token_bytes(NONCE_BYTES)
    line.send(MAGIC + own)
    text = line.exactly(_NAME.size + NONCE_BYTES + CODE_BYTES)
    (name,) = _NAME.unpack(text[: _NAME.size])
    return name, own + text[_NAME.size : -CODE_BYTES], text[-CODE_BYTES:]


def proof_of(token: bytes, name: int, nonces: bytes) -> bytes:
    """Return the code by which a receiver proves to know the token of an offer."""
    return hmac.digest(token, b"name" + _NAME.pack(name) + nonces, "sha256")


def ask(line: Line, name: int, token: bytes) -> None:
    """The receiver's greeting."""
    greeting = line.exactly(len(MAGIC) + NONCE_BYTES)
    if greeting[: len(MAGIC)] != MAGIC:
        raise Broken("it does not speak our language, or another release's")
    own = secrets.token_bytes(NONCE_BYTES)
    nonces = greeting[len(MAGIC) :] + own
    line.send(_NAME.pack(name) + own + proof_of(token, name, nonces))
    line.agree(token, nonces)


def bring(line: Line, views: Sequence[memoryview]) -> int:
    """Fill `views` with what the sender has, from the first byte on; return how many bytes. Raises
    KvGone where the sender has let go of it."""
    total = sum(map(len, views))
    spans = [(at, min(CHUNK_BYTES, total - at)) for at in range(0, total, CHUNK_BYTES)]
    for number, (at, size) in enumerate(spans):
        first = number + WINDOW - 1 if number else 0
        for span in spans[first : number + WINDOW]:
            line.send(line.tell(b"ask", _QUESTION.pack(READ, *span)))
        what, given, checksum = line.hear(b"say", _ANSWER)
        if what != GIVEN:
            raise KvGone("the sender has let go of the KV; prefill again")
        if given != size:
            raise Broken(f"{given} bytes came in place of {size}")
        found = 0
        for part in slices(views, at, size):
            line.fill(part)
            found = zlib.crc32(part, found)
        if found != checksum:
            raise Broken("bytes have changed on their way")
    return total


def take(line: Line) -> None:
    """Have the sender agree that all is ours now. Raises KvGone where it has let go of it."""
    line.send(line.tell(b"ask", _QUESTION.pack(TAKE, 0, 0)))
    what, _, _ = line.hear(b"say", _ANSWER)
    if what != GIVEN:
        raise KvGone("the sender has let go of the KV; prefill again")


def hear_question(line: Line) -> tuple[int, int, int]:
    """Receive what is asked, READ or TAKE, from where on, and how many bytes."""
    what, at, size = line.hear(b"ask", _QUESTION)
    if what not in (READ, TAKE) or size > CHUNK_BYTES:
        raise Broken("it asks what has no meaning here")
    return what, at, size


def refuse(line: Line) -> None:
    """Say that there is nothing to have."""
    line.send(line.tell(b"say", _ANSWER.pack(GONE, 0, 0)))


def give(line: Line, parts: Sequence[memoryview] = ()) -> None:
    """Send what was asked for; with no `parts`, say that all is theirs."""
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    line.send(line.tell(b"say", _ANSWER.pack(GIVEN, sum(map(len, parts)), checksum)), *parts)


def slices(views: Iterable[memoryview], at: int, size: int) -> list[memoryview]:
    """Return the bytes at .. at + size - 1 of all `views`, as far as there are so many."""
    parts = []
    for view in views:
        if at < len(view) and size > 0:
            parts.append(view[at : at + size])
            size -= len(parts[-1])
            at = 0
        else:
            at -= min(at, len(view))
    return parts
