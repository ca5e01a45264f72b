"""The seam of the catalogue: which models a domain serves now, the same for all its processes.

Whoever looks reads it whole; whoever changes it replaces what it has read, or reads again.
"""

import fcntl
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import msgspec

from aegaeon.errors import RegionError, StoreUnavailable
from aegaeon.specs import Catalog
from aegaeon.store.codec import decode_catalog, encode
from aegaeon.store.names import CATALOG, region_path

LOCK_S = 1.0  # a write takes less than a millisecond
LOCK_LOOK_S = 0.001


class CatalogView(ABC):
    """A catalogue to look at."""

    @abstractmethod
    def read(self) -> Catalog:
        """Return it as it is now: empty, of version 0, where nobody has written any.

        Looking when nothing has changed costs microseconds, but for Redis a round trip. Raises
        StoreUnavailable, RegionMismatch.
        """


class CatalogStore(CatalogView):
    """One domain's catalogue. Any thread may call any verb."""

    @abstractmethod
    def swap(self, expected_version: int, catalog: Catalog) -> bool:
        """Replace that of `expected_version`, or do nothing and return False: another is there.

        Raises StoreUnavailable, RegionError.
        """

    def change(self, edit: Callable[[Catalog], Catalog]) -> Catalog:
        """Replace it by what `edit` makes of it, whoever else changes it meanwhile, and return
        that; one that stays the same is not written. Raises as `swap`, and what `edit` raises."""
        while True:
            before = self.read()
            after = edit(before)
            if after == before:
                return before
            after = msgspec.structs.replace(after, version=before.version + 1)
            if self.swap(before.version, after):
                return after


class LocalCatalogStore(CatalogStore):
    """In this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._catalog = Catalog()

    def read(self) -> Catalog:
        return self._catalog

    def swap(self, expected_version: int, catalog: Catalog) -> bool:
        with self._lock:
            if self._catalog.version != expected_version:
                return False
            self._catalog = catalog
            return True


class FileCatalogStore(CatalogStore):
    """A file among the regions of a domain, always replaced whole."""

    def __init__(self, directory: Path, domain: str) -> None:
        self._path = region_path(directory, domain, CATALOG)
        self._lock_path = region_path(directory, domain, f"{CATALOG}lock")
        self._seen: tuple[tuple[int, int, int], Catalog] | None = None

    def read(self) -> Catalog:
        try:
            status = self._path.stat()
            version = status.st_mtime_ns, status.st_ino, status.st_size
            seen = self._seen
            if seen is not None and seen[0] == version:
                return seen[1]
            catalog = decode_catalog(self._path.read_bytes())
        except FileNotFoundError:
            return Catalog()
        # Replaced between the look and the reading it is read once more, no harm done.
        self._seen = version, catalog
        return catalog

    def swap(self, expected_version: int, catalog: Catalog) -> bool:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            lock = os.open(self._lock_path, flags, 0o600)
            try:
                self._take(lock)
                if self.read().version != expected_version:
                    return False
                self._write(encode(catalog))
                return True
            finally:
                os.close(lock)
        except OSError as error:
            raise RegionError(
                f"cannot write {self._path} ({error.strerror}); free memory there"
            ) from None

    def _take(self, lock: int) -> None:
        """Lock it, which others do for as long as a write takes."""
        give_up_s = time.monotonic() + LOCK_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= give_up_s:
                    raise StoreUnavailable(
                        f"somebody keeps {self._lock_path.name} locked, maybe a process that is "
                        "stopped; end it, or try again later"
                    ) from None
                time.sleep(LOCK_LOOK_S)

    def _write(self, record: bytes) -> None:
        new = self._path.with_name(
            f"{self._path.name}.new-{os.getpid()}-{threading.get_native_id()}"
        )
        try:
            descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(record)
            new.replace(self._path)
        finally:
            new.unlink(missing_ok=True)
