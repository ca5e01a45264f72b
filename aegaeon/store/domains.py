"""Which store a configuration means, and who owns a domain of this node.

A claim is a file lock, which the kernel takes back when its process ends, however it ends.
"""

import fcntl
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from aegaeon import _native
from aegaeon.config import Settings
from aegaeon.errors import ConfigError, RegionError, StoreUnavailable
from aegaeon.store.base import Domain
from aegaeon.store.names import (
    LOCK,
    MAILBOX,
    SHARED_MEMORY,
    check_name,
    domain_files,
    domain_of,
    region_path,
)
from aegaeon.store.shm import ShmDomain, remove_domain

log = logging.getLogger(__name__)

# Whoever only looks at a lock holds it for microseconds; an owner holds it for life.
LOCK_PATIENCE_S = 0.5
JOIN_S = 120.0
JOIN_PAUSE_S = 0.2


def _open_redis(settings: Settings, holds_lease: bool) -> Domain:
    # Imported here because its client takes a quarter of a second, in each process of a server.
    from aegaeon.store.redis import RedisDomain  # noqa: PLC0415

    return RedisDomain(
        settings.domain_name,
        settings.redis_url,
        lease_s=settings.lease_s,
        holds_lease=holds_lease,
    )


_DOMAINS: dict[str, Callable[[Settings, bool], Domain]] = {
    "shared_memory": lambda settings, _: ShmDomain(settings.domain_name),
    "redis": _open_redis,
}


def open_domain(settings: Settings, holds_lease: bool = False) -> Domain:
    """Return the domain that `settings` name; any process may, whether it is claimed or not. Who
    `holds_lease` there, an instance, does not wait so long for a store that is away.

    Raises ConfigError on a bad name or URL, StoreUnavailable when the store does not answer.
    """
    if settings.metadata_backend == "shared_memory":
        check_shared_memory(SHARED_MEMORY)
    return _DOMAINS[settings.metadata_backend](settings, holds_lease)


def join_domain(
    settings: Settings, patience_s: float = JOIN_S, holds_lease: bool = False
) -> Domain:
    """Return the domain of a server that runs, as `open_domain`; its store was there and will be
    again: to end because it is silent just now would only put off serving."""
    deadline_s = time.monotonic() + patience_s
    while True:
        try:
            return open_domain(settings, holds_lease)
        except StoreUnavailable as error:
            if time.monotonic() >= deadline_s:
                raise
            log.warning("not joined yet domain=%s error=%s", settings.domain_name, error)
            time.sleep(JOIN_PAUSE_S)


class DomainClaim:
    """The ownership of a domain, for the life of its owner or until `release`."""

    def __init__(self, lock: int, path: Path, name: str, domain: Domain) -> None:
        """Take over the locked descriptor `lock` of the file `path`."""
        self._lock: int | None = lock
        self._name = name
        self._path = path
        self._domain = domain

    def release(self) -> None:
        """Remove the domain with all it holds, then the claim. Idempotent."""
        if self._lock is None:
            return
        lock, self._lock = self._lock, None
        try:
            self._domain.unlink()
            self._domain.close()
        finally:
            # Weights and KV lie on this node whatever the store is.
            remove_domain(self._name, self._path.parent)
            # Still locked, so that this removes our file and not a successor's.
            self._path.unlink(missing_ok=True)
            os.close(lock)

    def __enter__(self) -> "DomainClaim":
        """Return the claim."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release it."""
        self.release()


def claim_domain(settings: Settings, directory: Path = SHARED_MEMORY) -> DomainClaim:
    """Become the owner of the domain, which starts empty; sweep what dead owners have left.

    The claim is one among the processes of this node. Supervisors on several hosts that share a
    Redis need a domain each: it does not see that another host's is alive.

    Raises ConfigError when a live process owns it, StoreUnavailable when its store does not answer.
    """
    check_shared_memory(directory)
    name = check_name("domain", settings.domain_name)
    path = region_path(directory, name, LOCK)
    try:
        lock = _take_lock(path, LOCK_PATIENCE_S)
    except OSError as error:
        raise ConfigError(
            f"cannot create {path} ({error.strerror}); free memory there, make it larger "
            "(docker: --shm-size) or remove what another user left under that name"
        ) from None
    if lock is None:
        raise ConfigError(
            f"domain {name} belongs to a running server{_owner_of(path)}; stop it, "
            "or choose another --domain or --port"
        )
    try:
        remove_domain(name, directory)
        sweep_domains(directory)
        _sign(lock)
        domain = _open_in(settings, directory)
        domain.unlink()
    except BaseException:
        path.unlink(missing_ok=True)
        os.close(lock)
        raise
    return DomainClaim(lock, path, name, domain)


def domain_is_live(settings: Settings, directory: Path = SHARED_MEMORY) -> bool:
    """Say whether a live process of this node owns the domain."""
    return _is_locked(region_path(directory, check_name("domain", settings.domain_name), LOCK))


def removable_files(settings: Settings, directory: Path = SHARED_MEMORY) -> list[Path]:
    """Return what a claim of the domain would remove: its own files and those of dead owners.

    Looks only. Where the domain is live its files are meant too, as after its owner's end.
    """
    names = {check_name("domain", settings.domain_name)}
    for path in directory.glob(f"aegaeon-*.{LOCK}"):
        name = domain_of(path)
        try:
            if name is not None and not _is_locked(path):
                names.add(name)
        except PermissionError:
            continue  # another user's; theirs to sweep
    return [file for name in sorted(names) for file in domain_files(directory, name)]


def sweep_domains(directory: Path = SHARED_MEMORY) -> int:
    """Remove what owners that are dead have left in `directory`; return how many domains.

    A domain without a lock was never claimed and is left alone.
    """
    swept = 0
    for path in directory.glob(f"aegaeon-*.{LOCK}"):
        name = domain_of(path)
        if name is None or path != region_path(directory, name, LOCK):
            continue
        try:
            lock = _take_lock(path, patience_s=0.0)
        except PermissionError:
            continue  # another user's; theirs to sweep
        if lock is None:
            continue
        removed = remove_domain(name, directory)
        path.unlink(missing_ok=True)
        os.close(lock)
        swept += 1
        log.info("left-overs removed domain=%s regions=%d", name, removed)
    return swept


def sweep_mailboxes(domain: str, directory: Path = SHARED_MEMORY) -> int:
    """Remove the mailboxes of `domain` whose readers are dead; return how many. Processes that no
    supervisor buries leave theirs: workers of a server that is not ours."""
    swept = 0
    for path in directory.glob(f"aegaeon-{domain}.{MAILBOX}+*"):
        try:
            has_reader = _native.Ring.attach(str(path)).has_reader
        except RegionError:
            continue  # removed meanwhile, or being made
        if not has_reader and _native.unlink(str(path)):
            swept += 1
            log.info("mailbox of a dead process removed path=%s", path)
    return swept


def check_shared_memory(directory: Path) -> None:
    """Raise ConfigError when `directory` cannot hold the regions."""
    if not directory.is_dir():
        raise ConfigError(
            f"{directory} does not exist, so there is no shared memory; mount a tmpfs there"
        )
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{directory} is not writable, so there is no shared memory; give it mode 1777"
        )


def _open_in(settings: Settings, directory: Path) -> Domain:
    if settings.metadata_backend == "shared_memory":
        return ShmDomain(settings.domain_name, directory)
    return open_domain(settings)


def _is_locked(path: Path) -> bool:
    try:
        lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _take_lock(path: Path, patience_s: float) -> int | None:
    """Create and lock the file; None when another process keeps it locked."""
    deadline_s = time.monotonic() + patience_s
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            if time.monotonic() >= deadline_s:
                return None
            time.sleep(0.01)
            continue
        # The last owner may have removed the file between our open and our lock.
        if is_at(lock, path):
            return lock
        os.close(lock)


def _sign(lock: int) -> None:
    """Say who owns the claim. It stands unsigned too, where memory is full: whether there is enough
    to serve is for others to say."""
    with suppress(OSError):
        os.truncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)


def is_at(descriptor: int, path: Path) -> bool:
    """Say whether `path` is what the descriptor was opened from."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _owner_of(path: Path) -> str:
    try:
        return f" (pid {int(path.read_text())})"
    except (OSError, ValueError):
        return ""
