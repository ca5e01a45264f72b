"""API keys: who may ask, for what. A file holds their hashes; what a key is, only its owner has.

A key is 256 random bits, so a plain SHA-256 hides it: there is nothing to guess that a slow or
salted hash would make dearer, and a slow one would be paid by every request.
"""

import fcntl
import hashlib
import hmac
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta

from aegaeon.errors import ConfigError, InvalidRequest
from aegaeon.types import ModelId

Scope = Literal["inference", "admin", "metrics"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

PREFIX = "aeg-"  # by which people and scanners of leaked secrets know one
KEY_BYTES = 32
MAX_KEY_CHARS = 512  # of what is hashed at all
MAX_FILE_BYTES = 16 << 20
FILE_MODE = 0o600

KeyName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]


class Key(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One key of the file. `models` are those it may use (empty: all). Of two keys with requests
    waiting, one with twice the `weight` is to get twice the tokens."""

    name: KeyName
    sha256: Digest
    scopes: tuple[Scope, ...] = ("inference",)
    models: tuple[ModelId, ...] = ()
    weight: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    created: str = ""

    def may(self, scope: Scope) -> bool:
        """Whether it has `scope`."""
        return scope in self.scopes

    def may_use(self, model: ModelId) -> bool:
        """Whether it may ask `model`, and see that it is served."""
        return not self.models or model in self.models


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: tuple[Key, ...] = ()


def digest_of(secret: str) -> bytes:
    """Return what is kept of a key."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


class KeyRing:
    """The keys of a file as last read. Owned by one event loop."""

    def __init__(self, path: str | Path) -> None:
        """Read the file. Raises ConfigError: a server that was told of keys never runs without."""
        self._path = Path(path).expanduser()
        self._seen = _version(self._path)
        self._keys = _by_digest(read_keys(self._path))

    def find(self, secret: str) -> Key | None:
        """Return the key that `secret` is, in a time that tells nothing of the others."""
        if len(secret) > MAX_KEY_CHARS:
            return None
        digest = digest_of(secret)
        found = None
        for known, key in self._keys:  # to the end, whichever it is
            if hmac.compare_digest(known, digest):
                found = key
        return found

    def refresh(self) -> bool:
        """Read the file again if it has changed; say whether it had. Raises ConfigError once for
        each change that cannot be read; the keys stay as they were."""
        version = _version(self._path)
        if version == self._seen:
            return False
        self._seen = version
        self._keys = _by_digest(read_keys(self._path))
        return True


def read_keys(path: Path, may_be_missing: bool = False) -> tuple[Key, ...]:
    """Return the keys of the file. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        if may_be_missing:
            return ()
        raise ConfigError(
            f"there is no keys file {path}; make one: aegaeon keys create NAME --keys-file {path}"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot read the keys file {path}: {error.strerror}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"the keys file {path} is over {MAX_FILE_BYTES} bytes; name another one")
    try:
        keys = msgspec.json.decode(data, type=_File).keys
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is no keys file: {error}; restore it") from None
    names = [key.name for key in keys]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{path} has two keys named {twice!r}; remove one")
    return keys


def create_key(path: Path, key: Key) -> str:
    """Enter `key`, whose digest is replaced by that of a new secret, and return the secret, which
    is kept nowhere. Raises ConfigError."""
    secret = PREFIX + secrets.token_urlsafe(KEY_BYTES)
    made = msgspec.structs.replace(
        key,
        sha256=digest_of(secret).hex(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    with _alone(path):
        keys = read_keys(path, may_be_missing=True)
        if any(known.name == key.name for known in keys):
            raise ConfigError(
                f"{path} has a key named {key.name!r}; revoke it or choose another name"
            )
        _write(path, (*keys, made))
    return secret


def revoke_key(path: Path, name: str) -> None:
    """Take the key `name` out. Raises ConfigError, and InvalidRequest where there is none."""
    with _alone(path):
        keys = read_keys(path)
        rest = tuple(key for key in keys if key.name != name)
        if len(rest) == len(keys):
            raise InvalidRequest(f"{path} has no key named {name!r}; see `aegaeon keys list`")
        _write(path, rest)


def checked_key(values: dict[str, object]) -> Key:
    """Return a key of plain values. Raises ConfigError."""
    try:
        return msgspec.convert({"sha256": "0" * 64, **values}, Key)
    except msgspec.ValidationError as error:
        raise ConfigError(f"bad key: {error}") from None


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Of those who change the file, one at a time. Raises ConfigError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"cannot write the keys file {path}: {error.strerror}") from None
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)  # for as long as one write takes
        yield
    finally:
        os.close(directory)


def _write(path: Path, keys: tuple[Key, ...]) -> None:
    """Put the file in place whole: a server may read it at any moment."""
    data = msgspec.json.format(msgspec.json.encode(_File(keys)), indent=2) + b"\n"
    try:
        # Made with mode 0600, and so it stays.
        descriptor, name = tempfile.mkstemp(prefix=path.name, dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(descriptor, FILE_MODE)
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ConfigError(f"cannot write the keys file {path}: {error.strerror}") from None


def _by_digest(keys: Iterable[Key]) -> tuple[tuple[bytes, Key], ...]:
    return tuple((bytes.fromhex(key.sha256), key) for key in keys)


def _version(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino
