"""How nodes talk about models: a connection on which both prove that they know the secret.

Each side sends MAGIC and a nonce; the key of the connection is made of the secret and both. Then
frames: 4 bytes of length (big-endian), a code (HMAC-SHA-256 of direction, number and body) and
a body of MessagePack. After `Data` its bytes follow bare: the digest that came in a manifest, under
a code, tells whether they are right. Nothing is hidden from who listens; nobody can alter, replay
or ask. (Served by uvicorn files came at half of what a bare socket does: benchmark/cluster.py.)
"""

import hashlib
import hmac
import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from aegaeon.errors import ConfigError, TransferError
from aegaeon.transfer.manifest import MAX_MANIFEST_BYTES, Manifest

MAGIC = b"aegaeon\1"
NONCE_BYTES = 16
CODE_BYTES = 32
MAX_ASKING_BYTES = 4096
GREETING_S = 5.0  # for a connection to be made and greeted
IDLE_S = 20.0  # in which something has to come
MIN_SECRET_BYTES, MAX_SECRET_BYTES = 16, 4096
PIECE_BYTES = 1 << 20


class AskManifest(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Which files has the model of this name?"""

    model: str


class AskChunk(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The bytes of a chunk, of the content with this digest."""

    model: str
    digest: str
    file: str
    index: int


class Working(msgspec.Struct, frozen=True, tag=True):
    """The answer will take a while: so much of what has to be read is read."""

    done_bytes: int
    total_bytes: int


class Data(msgspec.Struct, frozen=True, tag=True):
    """So many bytes follow."""

    data_bytes: int


class Refused(msgspec.Struct, frozen=True, tag=True):
    """There is no answer: no such model, or its content is another by now."""

    why: Literal["unknown", "changed", "failed"]
    text: str


Question = AskManifest | AskChunk
Answer = Manifest | Working | Data | Refused
_Body = TypeVar("_Body")


class Line:
    """One side of a connection. Frames of the other side that are not its own raise TransferError;
    what the network does raises OSError. One thread's alone."""

    def __init__(
        self, connection: socket.socket, secret: bytes, side: Literal["ask", "say"]
    ) -> None:
        """Greet the other side; owns `connection`."""
        self._socket = connection
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        own = secrets.token_bytes(NONCE_BYTES)
        connection.settimeout(GREETING_S)
        connection.sendall(MAGIC + own)
        greeting = self.exactly(len(MAGIC) + NONCE_BYTES, GREETING_S)
        if greeting[: len(MAGIC)] != MAGIC:
            raise TransferError("it does not speak our language, or another release's")
        other = greeting[len(MAGIC) :]
        nonces = own + other if side == "ask" else other + own
        self._key = hmac.digest(secret, MAGIC + nonces, "sha256")
        self._own, self._other = (b"ask", b"say") if side == "ask" else (b"say", b"ask")
        self._sent = self._received = 0

    def send(self, body: Question | Answer) -> None:
        """Send a frame."""
        text = msgspec.msgpack.encode(body)
        code = self._code(self._own, self._sent, text)
        self._sent += 1
        self._socket.settimeout(IDLE_S)
        self._socket.sendall(len(text).to_bytes(4, "big") + code + text)

    def question(self, within_s: float) -> Question:
        """Receive what is asked."""
        return self._receive(Question, MAX_ASKING_BYTES, within_s)  # type: ignore[arg-type]

    def answer(self) -> Answer:
        """Receive an answer."""
        return self._receive(Answer, MAX_MANIFEST_BYTES, IDLE_S)  # type: ignore[arg-type]

    def _receive(self, kind: type[_Body], limit: int, within_s: float) -> _Body:
        head = self.exactly(4 + CODE_BYTES, within_s)
        size = int.from_bytes(head[:4], "big")
        if size > limit:
            raise TransferError(f"a frame of {size} bytes came, {limit} are the most")
        text = self.exactly(size, within_s if size <= MAX_ASKING_BYTES else 10 * within_s)
        if not hmac.compare_digest(head[4:], self._code(self._other, self._received, text)):
            raise TransferError("it does not know the secret; give both the same --secret-file")
        self._received += 1
        try:
            return msgspec.msgpack.decode(text, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise TransferError(f"it says what has no meaning here ({error})") from None

    def exactly(self, size: int, within_s: float) -> bytes:
        """Receive `size` bytes, all of them in `within_s`. What is promised takes memory only as
        it comes."""
        parts, until_s = [], time.monotonic() + within_s
        while size:
            self._socket.settimeout(max(0.001, until_s - time.monotonic()))
            part = self._socket.recv(min(size, PIECE_BYTES))
            if not part:
                raise ConnectionResetError("the connection ended")
            if time.monotonic() > until_s:
                raise TimeoutError("it takes too long")
            size -= len(part)
            parts.append(part)
        return b"".join(parts)

    def fill(self, view: memoryview, within_s: float) -> None:
        """Receive into all of `view`, something each IDLE_S and all of it in `within_s`."""
        until_s, got = time.monotonic() + within_s, 0
        self._socket.settimeout(IDLE_S)
        while got < len(view):
            part = self._socket.recv_into(view[got:])
            if not part:
                raise ConnectionResetError("the connection ended")
            got += part
            if time.monotonic() > until_s:
                raise TimeoutError(f"{len(view)} bytes took longer than {within_s:.0f} s")

    def close(self) -> None:
        """End the connection, also for a thread that waits on it."""
        with suppress(OSError):  # it has ended
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _code(self, side: bytes, number: int, text: bytes) -> bytes:
        code = hmac.new(self._key, side + number.to_bytes(8, "big"), hashlib.sha256)
        code.update(text)
        return code.digest()


def read_secret(path: str | Path) -> bytes:
    """Return the secret of the cluster in the file at `path`, without blanks around it.

    Raises ConfigError.
    """
    try:
        with Path(path).expanduser().open("rb") as file:
            secret = file.read(MAX_SECRET_BYTES).strip()
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"cannot read the secret of the cluster in {path} ({error}); make one with "
            "`umask 077; head -c 32 /dev/urandom | base64 > FILE` and give each node a copy"
        ) from None
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(
            f"the secret of the cluster in {path} has {len(secret)} bytes, take at least "
            f"{MIN_SECRET_BYTES}: `head -c 32 /dev/urandom | base64 > {path}`"
        )
    return secret


def split_address(text: str) -> tuple[str, int]:
    """Split HOST:PORT or [HOST]:PORT. Raises ConfigError."""
    host, _, port = text.strip().rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port[:6]) < 65536:
        raise ConfigError(f"{text!r} is no address of a node; it must look like HOST:PORT")
    return host, int(port)
