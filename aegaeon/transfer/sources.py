"""Where a model can come from: a directory that nodes share, or a node that has it."""

import os
import socket
import threading
import time
from abc import ABC, abstractmethod
from pathlib import Path

from aegaeon.errors import TransferError
from aegaeon.models.safetensors import FileVersion
from aegaeon.transfer.digests import kept, read_at
from aegaeon.transfer.manifest import Chunk, HeldFile, Manifest, check, files_of
from aegaeon.transfer.wire import (
    GREETING_S,
    Answer,
    AskChunk,
    AskManifest,
    Data,
    Line,
    Question,
    Refused,
    Working,
    split_address,
)

# Of a chunk, at worst: slower than 30 kB/s is no source.
CHUNK_S = 300.0
DIGESTS_S = 3600.0  # in which a node has read a model to tell its digests


class Changed(TransferError):
    """A source has another content by now."""


class Stream(ABC):
    """A way to chunks of a source, for one thread at a time."""

    @abstractmethod
    def read(self, chunk: Chunk, view: memoryview) -> None:
        """Fill `view` with `chunk`. Raises TransferError, OSError; another try may succeed."""

    @abstractmethod
    def close(self) -> None:
        """End it."""


class Source(ABC):
    """A place that has a model. `name` is for people."""

    name: str

    @abstractmethod
    def manifest(self) -> Manifest:
        """Return what the model there consists of. Raises TransferError, CheckpointError, OSError.
        To be asked before `open`, which opens that content."""

    @abstractmethod
    def open(self) -> Stream:
        """Return a way to its chunks. Raises TransferError, OSError."""

    @abstractmethod
    def close(self) -> None:
        """Break off a `manifest` under way in another thread."""


class SharedPath(Source, Stream):
    """A model in a directory that this node can read, like one of a file system of the network."""

    def __init__(self, directory: Path) -> None:
        """Take the model's directory."""
        self.name = str(directory)
        self._directory = directory
        self._versions: dict[str, FileVersion] = {}

    def manifest(self) -> Manifest:
        """Digests are told if they are kept there; to compute them it would be read twice."""
        self._versions = files_of(self._directory)
        if (found := kept(self._directory)) is not None and found.versions == self._versions:
            return found.manifest
        return Manifest(tuple(HeldFile(name, v[0]) for name, v in self._versions.items()))

    def open(self) -> Stream:
        """It has no state."""
        return self

    def read(self, chunk: Chunk, view: memoryview) -> None:
        """Read it, if the file is the one that was looked at."""
        with (self._directory / chunk.file).open("rb", buffering=0) as file:
            got = read_at(file.fileno(), view, chunk.offset)
            status = os.fstat(file.fileno())  # after the reading: what changed before it shows
        version = (status.st_size, status.st_mtime_ns, status.st_ino)
        if got != len(view) or version != self._versions[chunk.file]:
            raise Changed(f"{self.name}/{chunk.file} has changed")

    def close(self) -> None:
        """Nothing is open."""


class Peer(Source):
    """A node that shares its models."""

    def __init__(self, address: str, model: str, secret: bytes) -> None:
        """Take HOST:PORT and the model's name. Raises ConfigError."""
        self.name = address
        self._place = split_address(address)
        self._model, self._secret = model, secret
        self._digest = ""
        self._lock, self._is_closed = threading.Lock(), False
        self._line: Line | None = None

    def manifest(self) -> Manifest:
        """Ask, and wait while the node reads its files."""
        line = self._connect()
        with self._lock:
            self._line = line
            if self._is_closed:
                line.close()
        try:
            answer = _asked(line, AskManifest(self._model))
        except ConnectionError:
            raise TransferError(
                "the connection ended, as it does for who knows another secret; give both the "
                "same, or try again later"
            ) from None
        finally:
            line.close()
        if not isinstance(answer, Manifest):
            raise TransferError("it answers what was not asked")
        manifest = check(answer)
        self._digest = manifest.digest
        return manifest

    def open(self) -> Stream:
        """Connect."""
        return _PeerStream(self._connect(), self._model, self._digest)

    def close(self) -> None:
        """End the connection on which the manifest is awaited."""
        with self._lock:
            self._is_closed = True
            if self._line is not None:
                self._line.close()

    def _connect(self) -> Line:
        connection = socket.create_connection(self._place, timeout=GREETING_S)
        try:
            return Line(connection, self._secret, "ask")
        except BaseException:
            connection.close()
            raise


class _PeerStream(Stream):
    def __init__(self, line: Line, model: str, digest: str) -> None:
        self._line, self._model, self._digest = line, model, digest

    def read(self, chunk: Chunk, view: memoryview) -> None:
        answer = _asked(self._line, AskChunk(self._model, self._digest, chunk.file, chunk.index))
        if not isinstance(answer, Data) or answer.data_bytes != len(view):
            raise TransferError("it sends another size than it said")
        self._line.fill(view, CHUNK_S)

    def close(self) -> None:
        self._line.close()


def _asked(line: Line, question: Question) -> Answer:
    """Ask, and return what comes when the node has done its work. Raises TransferError, OSError."""
    line.send(question)
    until_s = time.monotonic() + DIGESTS_S
    while time.monotonic() < until_s:
        match answer := line.answer():
            case Working():
                continue
            case Refused(why="changed", text=text):
                raise Changed(text)
            case Refused(text=text):
                raise TransferError(text[:300])
            case _:
                return answer
    raise TransferError(f"it reads its files for more than {DIGESTS_S:.0f} s")
