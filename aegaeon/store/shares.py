"""A machine's shared memory that several owners have together: made by the first, removed by the
last. A share is a shared file lock, which the kernel takes back when its process ends.
"""

import fcntl
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from aegaeon.errors import ConfigError
from aegaeon.store.domains import check_shared_memory, is_at, sweep_domains
from aegaeon.store.names import LAYOUT, LOCK, SHARED_MEMORY, check_name, region_path
from aegaeon.store.shm import remove_domain

log = logging.getLogger(__name__)

PATIENCE_S = 60.0  # for another owner to make it
PAUSE_S = 0.02


class Share:
    """One owner's share of the memory called `name`, for the life of its process or until
    `release`. `layout` are the bytes that whoever made it wrote, the same for all owners."""

    def __init__(self, name: str, directory: Path, lock: int, layout: bytes) -> None:
        """Take over the descriptor `lock`, locked with others."""
        self.layout = layout
        self._name = name
        self._directory = directory
        self._lock: int | None = lock

    def release(self) -> None:
        """Let go; the last owner removes the memory. Idempotent."""
        if self._lock is None:
            return
        lock, self._lock = self._lock, None
        path = region_path(self._directory, self._name, LOCK)
        try:
            # Of two who leave at once one at least finds itself alone: a failed try lets go, too.
            if _try(lock, fcntl.LOCK_EX) and is_at(lock, path):
                remove_domain(self._name, self._directory)
                path.unlink(missing_ok=True)
        finally:
            os.close(lock)


def share_memory(name: str, make: Callable[[], bytes], directory: Path = SHARED_MEMORY) -> Share:
    """Become an owner of the memory called `name`. The first one removes what dead owners have
    left, and writes the layout that `make` returns.

    Raises ConfigError where a file cannot be made, or another owner takes too long over `make`;
    and what `make` raises.
    """
    check_shared_memory(directory)
    path = region_path(directory, check_name("domain", name), LOCK)
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ConfigError(
                f"cannot create {path} ({error.strerror}); free memory there, make it larger "
                "(docker: --shm-size) or remove what another user left under that name"
            ) from None
        try:
            layout = _taken(lock, path, name, make)
        except BaseException:
            os.close(lock)
            raise
        if layout is not None:
            return Share(name, directory, lock, layout)
        os.close(lock)
        time.sleep(PAUSE_S)
    raise ConfigError(
        f"another process has been making {path} for {PATIENCE_S:.0f} s; see its log, or stop it"
    )


def sweep_share(name: str, directory: Path = SHARED_MEMORY) -> bool:
    """Remove the memory called `name` if all its owners have ended; say whether it is gone."""
    path = region_path(directory, check_name("domain", name), LOCK)
    try:
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    try:
        if not (_try(lock, fcntl.LOCK_EX) and is_at(lock, path)):
            return False
        remove_domain(name, directory)
        path.unlink(missing_ok=True)
        return True
    finally:
        os.close(lock)


def _taken(lock: int, path: Path, name: str, make: Callable[[], bytes]) -> bytes | None:
    """Lock `lock` with others and return the layout; None: try it again."""
    layout = region_path(path.parent, name, LAYOUT)
    if _try(lock, fcntl.LOCK_EX):
        if not is_at(lock, path):
            return None  # the last owner has removed it meanwhile
        try:
            _make(layout, name, make)
        except BaseException:
            path.unlink(missing_ok=True)  # those who wait for the lock begin anew
            raise
    # Between the two locks another one may have made it anew: what is read now is what holds.
    if not _try(lock, fcntl.LOCK_SH) or not is_at(lock, path):
        return None
    try:
        return layout.read_bytes()
    except FileNotFoundError:
        return None  # who was to make it could not


def _make(layout: Path, name: str, make: Callable[[], bytes]) -> None:
    removed = remove_domain(name, layout.parent)
    if removed:
        log.info("left-overs removed domain=%s regions=%d", name, removed)
    sweep_domains(layout.parent)
    record = make()
    new = layout.with_name(f"{layout.name}.new-{os.getpid()}-0")
    try:
        new.write_bytes(record)
        new.replace(layout)
    except OSError as error:
        raise ConfigError(f"cannot write {layout} ({error.strerror}); free memory there") from None
    finally:
        with suppress(OSError):
            new.unlink(missing_ok=True)


def _try(lock: int, kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
