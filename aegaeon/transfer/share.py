"""The server of a node's models, for the other nodes of its cluster: a thread per connection, which
sends files without copying them.

Only what the operator named or has in the models directory is there to ask for, by name: no path
comes from outside.
"""

import logging
import os
import socket
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from pathlib import Path

from aegaeon.errors import AegaeonError, CheckpointError, TransferError
from aegaeon.models.hub_ids import NAME, directory_name
from aegaeon.models.references import id_of_directory
from aegaeon.transfer.digests import Digested, digest_directory
from aegaeon.transfer.manifest import chunk_at, files_of
from aegaeon.transfer.wire import (
    GREETING_S,
    IDLE_S,
    AskChunk,
    AskManifest,
    Data,
    Line,
    Question,
    Refused,
    Working,
)

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 64
MAX_DIGESTED = 2  # models whose digests are computed at once
TELL_S = 1.0  # between two words on how far that is
ASKING_S = 60.0  # a connection on which nothing is asked ends


class Shelf:
    """The models of this node by name: those given, and those in `models_dir` as it is by then."""

    def __init__(self, models: Mapping[str, Path], models_dir: Path | None = None) -> None:
        """Take directories by name, which go before those of `models_dir`."""
        self._models, self._models_dir = dict(models), models_dir

    def offer(self, models: Mapping[str, Path]) -> None:
        """Take these directories by name from here on, in the place of those before."""
        self._models = dict(models)

    def path_of(self, name: str) -> Path | None:
        """Return the directory of the model `name`. What is asked is compared, never a path."""
        if name in self._models or self._models_dir is None or not NAME.fullmatch(name):
            return self.models().get(name)
        path = self._models_dir / directory_name(name)  # begins with no dot and has no slash
        return path if (path / "config.json").is_file() else None

    def models(self) -> dict[str, Path]:
        """Return all of them."""
        found: dict[str, Path] = {}
        if self._models_dir is not None and self._models_dir.is_dir():
            for path in sorted(self._models_dir.iterdir()):
                if not path.name.startswith(".") and (path / "config.json").is_file():
                    found[id_of_directory(path)] = path
        return found | self._models


class _Content:
    """The digests of the models, each computed once, in threads of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(MAX_DIGESTED, thread_name_prefix="digests")
        self._known: dict[Path, Future[Digested]] = {}
        self._done: dict[Path, tuple[int, int]] = {}
        self._told: dict[Path, tuple[Digested, str]] = {}  # with the digest of the whole

    def ask(self, path: Path) -> "Future[Digested]":
        """Return the digests of the model at `path`, as it is now, or a promise of them."""
        with self._lock:
            known = self._known.get(path)
            if known is not None and not known.done():
                return known
            is_good = known is not None and known.exception() is None
            if known is not None and is_good and known.result().versions == files_of(path):
                return known
            self._done[path] = (0, 0)
            self._known[path] = self._pool.submit(
                digest_directory, path, lambda *done: self._done.update({path: done}), self._stop
            )
            return self._known[path]

    def known(self, path: Path) -> tuple[Digested, str] | None:
        """Return the digests that were told last, and that of the whole."""
        with self._lock:
            known, told = self._known.get(path), self._told.get(path)
            if known is None or not known.done() or known.exception() is not None:
                return None
            digested = known.result()
            if told is None or told[0] is not digested:
                told = self._told[path] = (digested, digested.manifest.digest)
            return told

    def done(self, path: Path) -> tuple[int, int]:
        """Bytes read for it, and in all."""
        return self._done.get(path, (0, 0))

    def close(self) -> None:
        """Stop all."""
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)


class Share:
    """Serves the models of `shelf` to who knows `secret`. Owns its threads; `close` ends them."""

    def __init__(self, shelf: Shelf, secret: bytes, host: str, port: int) -> None:
        """Listen at `host`, `port` (0: any free one). Raises TransferError."""
        self._shelf, self._secret, self._content = shelf, secret, _Content()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, port), family=family, backlog=128)
        except (OSError, OverflowError) as error:
            raise TransferError(f"cannot listen at {host}:{port} ({error}); give another") from None
        self.port: int = self._listener.getsockname()[1]
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._open: dict[threading.Thread, socket.socket] = {}
        self._accepting = threading.Thread(target=self._accept, name="share", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._accepting.start()

    def prepare(self) -> None:
        """Have the digests of all models ready before somebody asks for them."""
        for name, path in self._shelf.models().items():
            try:
                self._content.ask(path)
            except AegaeonError as error:
                log.warning("model not shared model=%s error=%s", name, error)

    def close(self) -> None:
        """Stop serving: transfers break off, and those who fetch go on elsewhere or later."""
        with self._lock:
            self._closing.set()
            threads = dict(self._open)
        _shut(self._listener)
        for connection in threads.values():
            _shut(connection)
        for thread in (self._accepting, *threads):
            if thread.ident is not None:
                thread.join(GREETING_S + IDLE_S)
        self._content.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._closing.wait(0.1):
                    return
                continue  # gone again before it was accepted, or too many files are open
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            with self._lock:
                is_full = len(self._open) >= MAX_CONNECTIONS or self._closing.is_set()
                if not is_full:
                    self._open[thread] = connection
            if is_full:
                connection.close()  # who fetches asks again, or others
            else:
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            line = Line(connection, self._secret, "say")
            within_s = GREETING_S
            while True:
                self._reply(line, connection, line.question(within_s))
                within_s = ASKING_S
        except (OSError, TransferError) as error:
            log.debug("connection ended error=%s", error)
        except Exception:
            if not self._closing.is_set():
                log.exception("connection failed")
        finally:
            _shut(connection)
            with self._lock:
                self._open.pop(threading.current_thread(), None)

    def _reply(self, line: Line, connection: socket.socket, question: Question) -> None:
        path = self._shelf.path_of(question.model)
        if path is None:
            line.send(Refused("unknown", "it has no such model"))
            return
        match question:
            case AskManifest():
                self._tell(line, path)
            case AskChunk():
                self._send(line, connection, path, question)

    def _tell(self, line: Line, path: Path) -> None:
        try:
            coming = self._content.ask(path)
            while True:
                try:
                    digested = coming.result(TELL_S)
                    break
                except NotYet:
                    line.send(Working(*self._content.done(path)))
        except (TransferError, CheckpointError) as error:
            log.warning("model not shared path=%s error=%s", path, error)
            line.send(Refused("failed", "it cannot read that model, as its log says"))
        else:
            line.send(digested.manifest)

    def _send(self, line: Line, connection: socket.socket, path: Path, question: AskChunk) -> None:
        told = self._content.known(path)
        if told is None or told[1] != question.digest:
            line.send(Refused("changed", "it has another content of that model"))
            return
        known = told[0]
        held = next((file for file in known.manifest.files if file.name == question.file), None)
        if held is None or not 0 <= question.index < held.chunks:
            line.send(Refused("unknown", "that model has no such part"))
            return
        chunk = chunk_at(held, question.index)
        try:
            file = (path / held.name).open("rb", buffering=0)
        except OSError as error:
            line.send(Refused("failed", f"it cannot read {held.name!r} ({error.strerror})"))
            return
        with file:
            status = os.fstat(file.fileno())
            version = (status.st_size, status.st_mtime_ns, status.st_ino)
            if version != known.versions[held.name]:
                line.send(Refused("changed", f"its {held.name!r} has changed"))
                return
            line.send(Data(chunk.chunk_bytes))
            connection.settimeout(IDLE_S)
            # Fewer, where the file was cut off since: the connection is of no use any more.
            if connection.sendfile(file, chunk.offset, chunk.chunk_bytes) != chunk.chunk_bytes:
                raise TransferError(f"{path / held.name} was cut off while it was sent")


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):  # it has ended
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
