"""Brings chunks from several sources at once, each over several connections: whoever is free takes
the next one, so each source gives what it can."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence

from aegaeon.errors import AegaeonError, CannotStore, CheckpointError, TransferError
from aegaeon.transfer.manifest import CHUNK_BYTES, Chunk
from aegaeon.transfer.sources import Changed, Source, Stream
from aegaeon.transfer.storing import Damaged, Storing

CONNECTIONS = 4  # to a source; one waits for its answer or digests while others bring
MAX_THREADS = 16
ATTEMPTS = 7  # of a source in a row, each after twice the wait: 13 s, so a node may start anew
FIRST_WAIT_S = 0.2
DAMAGED_TWICE = 2  # then that chunk is asked of others
MAX_DAMAGED = 8  # then everything is
STOPPING_S = 0.5  # between looks whether anything is left to do


class Work:
    """What is to be brought, who brings what, and how it goes. For several threads."""

    def __init__(
        self, chunks: Sequence[Chunk], connections: int, progress: Callable[[int], None]
    ) -> None:
        """Take all chunks, and how many threads each source has; `progress` is told the bytes of
        each chunk that is here."""
        self._connections = connections
        self._left = list(reversed(chunks))
        self._under_way = 0
        self._damaged: Counter[tuple[str, int, str]] = Counter()
        self._attempts: Counter[str] = Counter()
        self._progress = progress
        self._changed = threading.Condition()
        self.failure: Exception | None = None
        self.reasons: dict[str, Exception] = {}  # of sources, what went wrong last

    @property
    def is_done(self) -> bool:
        """Whether all is here."""
        with self._changed:
            return not self._left and not self._under_way

    def take(self, source: str) -> Chunk | None:
        """Return a chunk for `source` to bring; None when there is none and will be none."""
        with self._changed:
            while self.failure is None and self._is_trusted(source):
                for at in range(len(self._left) - 1, -1, -1):
                    if self._damaged[_key(self._left[at], source)] < DAMAGED_TWICE:
                        self._under_way += 1
                        return self._left.pop(at)
                if not self._under_way:
                    break
                self._changed.wait(STOPPING_S)  # what is under way elsewhere may come back
            return None

    def done(self, chunk: Chunk, source: str | None) -> None:
        """`chunk` is here, brought by `source`, or was before."""
        with self._changed:
            self._under_way -= 1
            if source is not None:
                self._attempts[source] = 0
            self._progress(chunk.chunk_bytes)
            self._changed.notify_all()

    def back(self, chunk: Chunk, source: str, error: Exception) -> float | None:
        """`source` did not bring `chunk`; return how long it is to wait, None for ever."""
        with self._changed:
            self._under_way -= 1
            self._left.append(chunk)
            self.reasons[source] = error
            self._changed.notify_all()
            if isinstance(error, Damaged):
                self._damaged[_key(chunk, source)] += 1
                return 0.0 if self._is_trusted(source) else None
            self._attempts[source] += 2 if isinstance(error, TimeoutError) else 1  # waited already
            attempts = self._attempts[source]
            if isinstance(error, Changed) or attempts >= ATTEMPTS * self._connections:
                return None
            return float(FIRST_WAIT_S * 2 ** ((attempts - 1) // self._connections))

    def fail(self, error: Exception) -> None:
        """Stop everybody."""
        with self._changed:
            self.failure = self.failure or error
            self._changed.notify_all()

    def wait(self, wait_s: float) -> None:
        """Wait so long, or until all is over."""
        with self._changed:
            self._changed.wait_for(
                lambda: self.failure is not None or not (self._left or self._under_way), wait_s
            )

    def _is_trusted(self, source: str) -> bool:
        return sum(n for key, n in self._damaged.items() if key[2] == source) < MAX_DAMAGED


def bring(
    chunks: Sequence[Chunk],
    sources: Sequence[Source],
    storing: Storing,
    progress: Callable[[int], None],
) -> None:
    """Have all `chunks` in `storing`; returns when its threads have ended.

    Raises TransferError with what each source did wrong (Changed, if one has another content by
    now), CannotStore.
    """
    each = max(1, min(CONNECTIONS, MAX_THREADS // len(sources), len(chunks)))
    work = Work(chunks, each, progress)
    threads = [
        threading.Thread(target=_bring, args=(work, source, storing), daemon=True)
        for _ in range(each)
        for source in sources
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()  # each ends: whatever it waits for has a bound
    except BaseException:  # interrupted: leave no thread that writes
        work.fail(TransferError("interrupted"))
        for thread in threads:
            thread.join()
        raise
    if work.failure is not None:
        raise work.failure
    if not work.is_done:
        kind = Changed if any(type(e) is Changed for e in work.reasons.values()) else TransferError
        raise kind("; ".join(f"{name}: {told(error)}" for name, error in work.reasons.items()))


def told(error: Exception) -> str:
    """Return in words what went wrong with a source."""
    if isinstance(error, AegaeonError):
        return str(error)
    if isinstance(error, TimeoutError):
        return str(error) if str(error) not in ("", "timed out") else "it does not answer"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _bring(work: Work, source: Source, storing: Storing) -> None:
    stream: Stream | None = None
    buffer = memoryview(bytearray(CHUNK_BYTES))
    try:
        while (chunk := work.take(source.name)) is not None:
            view = buffer[: chunk.chunk_bytes]
            try:
                if storing.has(chunk, view):
                    work.done(chunk, None)
                    continue
                stream = stream or source.open()
                stream.read(chunk, view)
                storing.put(chunk, view)
            except CannotStore:
                raise
            except (OSError, TransferError, CheckpointError) as error:
                _close(stream)
                stream = None
                wait_s = work.back(chunk, source.name, error)
                if wait_s is None:
                    return
                work.wait(wait_s)
            else:
                work.done(chunk, source.name)
    except Exception as error:  # of this thread, raised by `bring`
        work.fail(error)
    finally:
        _close(stream)


def _close(stream: Stream | None) -> None:
    if stream is not None:
        stream.close()


def _key(chunk: Chunk, source: str) -> tuple[str, int, str]:
    return chunk.file, chunk.index, source
