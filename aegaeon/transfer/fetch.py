"""Brings a model into this node's models directory, once for all processes of the node."""

import fcntl
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from aegaeon.errors import (
    AegaeonError,
    CannotStore,
    CheckpointError,
    ConfigError,
    ModelNotFound,
    TransferError,
)
from aegaeon.models.checkpoint import plan_load
from aegaeon.models.config import read_config
from aegaeon.models.hub_ids import HUB_ID, NAME, directory_name
from aegaeon.nodes import Origin
from aegaeon.transfer.bring import bring, told
from aegaeon.transfer.digests import Progress, digested_of, keep
from aegaeon.transfer.manifest import Chunk, HeldFile, Manifest, chunks_of
from aegaeon.transfer.sources import Changed, Peer, SharedPath, Source
from aegaeon.transfer.storing import Storing, storing

log = logging.getLogger(__name__)

OTHERS_S = 1.0  # that the first node to tell its content waits for others with the same
MAX_SOURCES = 8  # from which a model comes at once; others after them
ORIGINS: tuple[Origin, ...] = ("shared", "peers", "hub")
ROUNDS = 3  # of asking anew when contents change meanwhile
LOOK_S = 0.2  # between looks whether another process is done


class Sources(msgspec.Struct, frozen=True, kw_only=True):
    """Where a model may come from, in this `order`. `shared_dirs` are models directories that this
    node can read, `peers` are HOST:PORT of nodes that share theirs to who knows `secret`, and
    `digest`, if given, is the content that is wanted of either."""

    shared_dirs: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    secret: bytes = b""
    digest: str = ""
    has_hub: bool = True
    order: tuple[Origin, ...] = ORIGINS


def fetch(
    name: str,
    models_dir: str | Path,
    sources: Sources,
    progress: Progress = lambda _done, _total: None,
    wait_s: float = 6 * 3600.0,
) -> Path:
    """Have the model `name` in `models_dir`, and return its directory.

    Nothing is done if it is there. Else one process of the node fetches it and the others wait for
    up to `wait_s`. What comes is checked against digests and is no model before all of it is here;
    a fetch that was broken off goes on where it was. `progress` is told bytes.
    Raises ConfigError (a name or address that cannot be), TransferError (with all that was tried),
    CannotStore (this node's disk), UnsupportedModel.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot be fetched; a model is called Org/Name or Name")
    target = Path(models_dir).expanduser() / directory_name(name)
    _bring_once(target, wait_s, lambda: _Fetch(name, target, sources, progress).run())
    return target


def fetch_texts(name: str, models_dir: str | Path, sources: Sources, wait_s: float = 600.0) -> Path:
    """Have in `models_dir` what describes the model `name`, its tokenizer and not its tensors, and
    return that directory, which is no model. As `fetch`, and without the hub."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot be fetched; a model is called Org/Name or Name")
    target = Path(models_dir).expanduser() / directory_name(name)
    sources = msgspec.structs.replace(sources, has_hub=False)
    _bring_once(target, wait_s, lambda: _TextFetch(name, target, sources, _untold).run())
    return target


def _untold(_done: int, _total: int) -> None:
    """Progress of what is small."""


def _bring_once(target: Path, wait_s: float, run: Callable[[], None]) -> None:
    """Have `run` make the directory `target` where there is none, once for all processes."""
    if target.is_dir():
        return
    with storing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(target.with_name(f".{target.name}.lock"), wait_s):
        if not target.is_dir():
            run()


class _Fetch:
    """One fetch, by the only process that does."""

    def __init__(self, name: str, target: Path, sources: Sources, progress: Progress) -> None:
        self._name, self._target, self._sources = name, target, sources
        self._partial = target.with_name(f".{target.name}.fetch")
        self._progress = progress
        self._tried = [f"{target} is not there"]

    def run(self) -> None:
        """Try all sources in order. Raises what `fetch` does."""
        tries = {"shared": self._try_shared, "peers": self._try_peers, "hub": self._try_hub}
        if not any(tries[origin]() for origin in self._sources.order):
            raise TransferError(
                f"cannot fetch {self._name}: {'; '.join(self._tried)}; check that one of these has "
                "it, or name others"
            )

    def _try_shared(self) -> bool:
        directories = (Path(one).expanduser() for one in self._sources.shared_dirs)
        return any(self._try_one(SharedPath(one / self._target.name)) for one in directories)

    def _try_one(self, source: Source) -> bool:
        for _ in range(ROUNDS):
            try:
                manifest = source.manifest()
                if self._is_wanted(source, manifest):
                    self._bring(manifest, [source])
                    return True
                return False
            except Changed as error:
                reason = str(error)
            except (OSError, TransferError, CheckpointError, ModelNotFound) as error:
                if isinstance(error, CannotStore):
                    raise
                self._tried.append(f"{source.name}: {told(error)}")
                return False
        self._tried.append(reason)
        return False

    def _try_peers(self) -> bool:
        """Fetch from all that have the same content at once; of several contents that of the first
        peer goes first."""
        if not self._sources.peers:
            return False
        for _ in range(ROUNDS):
            peers = [Peer(peer, self._name, self._sources.secret) for peer in self._sources.peers]
            is_changed = False
            for manifest, same in self._groups(peers):
                try:
                    self._bring(manifest, same)
                except Changed as error:
                    is_changed = True
                    self._tried.append(str(error))
                except (TransferError, CheckpointError, ModelNotFound) as error:
                    if isinstance(error, CannotStore):
                        raise
                    self._tried.append(str(error))
                else:
                    return True
            if not is_changed:
                break
        return False

    def _groups(self, peers: Sequence[Source]) -> list[tuple[Manifest, list[Source]]]:
        groups: dict[str, tuple[Manifest, list[Source]]] = {}
        for peer, answer in zip(peers, manifests(peers), strict=True):
            if isinstance(answer, Exception):
                self._tried.append(f"{peer.name}: {told(answer)}")
            elif self._is_wanted(peer, answer):
                groups.setdefault(answer.digest, (answer, []))[1].append(peer)
        if len(groups) > 1:
            contents = {digest[:12]: [p.name for p in same] for digest, (_, same) in groups.items()}
            log.warning("nodes differ in a model model=%s contents=%s", self._name, contents)
        return [
            (manifest, same[at : at + MAX_SOURCES])
            for manifest, same in groups.values()
            for at in range(0, len(same), MAX_SOURCES)
        ]

    def _is_wanted(self, source: Source, manifest: Manifest) -> bool:
        wanted = self._sources.digest
        if wanted and manifest.digest != wanted:
            self._tried.append(f"{source.name}: it has another content, {manifest.digest}")
            return False
        return True

    def _try_hub(self) -> bool:
        if not self._sources.has_hub:
            return False
        if not HUB_ID.fullmatch(self._name):
            self._tried.append(f"the hub: {self._name} is not Org/Name")
            return False
        # Imported here because the hub's library takes a fifth of a second, in each process.
        from aegaeon.models.hub import pull  # noqa: PLC0415

        try:
            pull(self._name, self._target.parent)
        except (ModelNotFound, CheckpointError) as error:
            self._tried.append(f"the hub: {error}")
            return False
        return True

    def _bring(self, manifest: Manifest, sources: Sequence[Source]) -> None:
        """Bring it in place. What describes the model comes first and is looked at."""
        files = self._wanted(manifest.files)
        total_bytes = sum(file.file_bytes for file in files)
        with storing(self._partial):
            self._partial.mkdir(exist_ok=True)
            _remove_others(self._partial, {file.name for file in files})
        began_s = time.monotonic()
        storing_all = Storing(self._partial, files)
        try:
            count = _Count(total_bytes, self._progress)
            for chunks in _in_turn(files):
                bring(chunks, sources, storing_all, count.add)
                read_config(self._partial)
            storing_all.sync()
            digests = storing_all.digests
        finally:
            storing_all.close()
        self._check()
        keep(self._partial, digested_of(self._partial, digests))
        self._put_in_place()
        gb_per_s = total_bytes / 1e9 / (time.monotonic() - began_s)
        names = ", ".join(source.name for source in sources)
        log.info("model fetched model=%s from=%s gb_per_s=%.3f", self._name, names, gb_per_s)

    def _wanted(self, files: tuple[HeldFile, ...]) -> tuple[HeldFile, ...]:
        return files

    def _check(self) -> None:
        """Look whether all that came is a model. Raises CheckpointError, UnsupportedModel."""
        plan_load(self._partial)

    def _put_in_place(self) -> None:
        with storing(self._partial):
            _sync_directory(self._partial)
            try:
                self._partial.rename(self._target)
            except OSError:
                if not self._target.is_dir():  # else somebody brought it by other means
                    raise
                shutil.rmtree(self._partial, ignore_errors=True)
            _sync_directory(self._target.parent)


class _TextFetch(_Fetch):
    """Of what describes a model."""

    def _wanted(self, files: tuple[HeldFile, ...]) -> tuple[HeldFile, ...]:
        return tuple(file for file in files if not file.is_weights)

    def _check(self) -> None:
        read_config(self._partial)


class _Count:
    def __init__(self, total_bytes: int, progress: Progress) -> None:
        self._done, self._total, self._progress = 0, total_bytes, progress

    def add(self, more: int) -> None:
        self._done += more
        self._progress(self._done, self._total)


def manifests(peers: Sequence[Source]) -> list[Manifest | Exception]:
    """Return what each peer has, or why it does not tell; those that are long in reading their
    files are not waited for once another has told."""
    answers: dict[int, Manifest | Exception] = {}
    has_first = threading.Event()

    def ask(index: int, peer: Source) -> None:
        try:
            answers[index] = peer.manifest()
            has_first.set()
        except (AegaeonError, OSError) as error:
            answers[index] = error

    threads = [threading.Thread(target=ask, args=one, daemon=True) for one in enumerate(peers)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) and not has_first.wait(LOOK_S):
        pass  # bounded: peers are waited for so long, not longer
    until_s = time.monotonic() + OTHERS_S
    for thread in threads:
        thread.join(max(0.0, until_s - time.monotonic()))
    for index, (thread, peer) in enumerate(zip(threads, peers, strict=True)):
        if thread.is_alive():
            peer.close()
            thread.join()
            if not isinstance(answers.get(index), Manifest):
                answers[index] = TransferError("it still reads its files")
    return [answers[index] for index in range(len(peers))]


def _in_turn(files: Sequence[HeldFile]) -> Iterator[list[Chunk]]:
    for is_weights in (False, True):
        yield [c for file in files if file.is_weights is is_weights for c in chunks_of(file)]


def _remove_others(directory: Path, names: set[str]) -> None:
    for path in directory.iterdir():
        if path.name not in names:
            path.unlink()


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _alone(path: Path, wait_s: float) -> Iterator[None]:
    """Be the only process that holds the lock at `path`. A process that dies lets go of it."""
    with storing(path):
        handle = _locked(path, time.monotonic() + wait_s)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who opened it before looks again
        os.close(handle)


def _locked(path: Path, until_s: float) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(path.stat(), os.fstat(handle)):
                return handle
        except BlockingIOError:
            if time.monotonic() > until_s:
                os.close(handle)
                raise TransferError(
                    f"another process of this node holds {path} for long; see what it does"
                ) from None
            time.sleep(LOOK_S)
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
