"""Takes a login out of this process's command line, which every user of the machine can read."""

import ctypes
import os
from pathlib import Path

_ARG_START, _ARG_END = 45, 46  # in /proc/self/stat, behind the name: proc(5)


def hide_login(url: str) -> str:
    """Return `url`; where it has a login, what `ps` shows of it from now on are stars."""
    place = url.partition("://")[2]
    if "@" in place or "password=" in place:
        _cover(os.fsencode(place))
    return url


def _cover(word: bytes) -> None:
    """Overwrite `word` wherever it stands among the arguments that this process was started with.
    Python has its own copy of them."""
    try:
        fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
        start, end = int(fields[_ARG_START]), int(fields[_ARG_END])
    except (OSError, IndexError, ValueError):
        return  # no Linux, where others see no command line this way
    arguments = ctypes.string_at(start, end - start) if 0 < start < end else b""
    at = arguments.find(word)
    while at >= 0:
        ctypes.memset(start + at, ord("*"), len(word))
        at = arguments.find(word, at + len(word))
