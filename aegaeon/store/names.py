"""Names of domains and mailboxes, and the shared-memory files that stand for them.

A file is `aegaeon-<domain>.<kind>` or `aegaeon-<domain>.<kind>+<address>`. Names hold no `+` and
no `/`, so every file belongs to exactly one domain, and no name can lead out of the directory.
"""

import re
from pathlib import Path

from aegaeon.errors import ConfigError

SHARED_MEMORY = Path("/dev/shm")
LOCK = "lock"
MAILBOX = "mailbox"
KV = "kv"
CATALOG = "catalog"
WEIGHTS = "weights"
LOADS = "loads"
NEIGHBOURS = "neighbours"
LAYOUT = "layout"
BOARDS = ("boarda", "boardb")

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
# A region being made has an ending of its own until it is whole.
_FILE = re.compile(
    r"aegaeon-(?P<domain>[A-Za-z0-9._-]+)\.(?P<kind>[a-z]+)(\+[^+]*)?(\.new-\d+-\d+)?"
)


def check_name(what: str, name: str) -> str:
    """Return `name` if it may name a domain or mailbox, else raise ConfigError."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{what} {name!r} must be 1 to 100 letters, digits, '.', '_' or '-', "
            "and not begin with '.'; choose another name"
        )
    return name


def region_path(directory: Path, domain: str, kind: str, address: str | None = None) -> Path:
    """Return the file of a domain's region `kind`, or of its mailbox `address`."""
    ending = kind if address is None else f"{kind}+{address}"
    return directory / f"aegaeon-{domain}.{ending}"


def domain_of(path: Path) -> str | None:
    """Return the domain that the file `path` belongs to, or None when it is not ours."""
    match = _FILE.fullmatch(path.name)
    return match["domain"] if match else None


def domain_files(directory: Path, domain: str) -> list[Path]:
    """Return what exists of `domain`, but for its lock."""
    lock = region_path(directory, domain, LOCK)
    files = directory.glob(f"aegaeon-{domain}.*")
    return sorted(path for path in files if path != lock and domain_of(path) == domain)
