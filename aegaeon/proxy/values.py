"""How many values JSON has, before any of them is made, and what those take that were.

A decoder makes millions of objects of some megabytes, and nothing else runs meanwhile, no stream
either; to count the signs between them takes milliseconds.
"""

import sys
from collections.abc import Sequence
from typing import Any

import msgspec

from aegaeon.proxy.failures import invalid

MAX_VALUES = 1 << 20  # token ids of a long prompt among them
MAX_NESTED = 1 << 16  # objects and lists: many times as dear as numbers
MAX_STRINGS = 1 << 18


def check_values(texts: Sequence[bytes], param: str | None = None) -> None:
    """Raise ApiError where these texts, each of them JSON, have too many values together."""
    if sum(map(len, texts)) <= MAX_NESTED or not _excess(texts, _quotes(texts)):
        return
    # It may be what stands within strings.
    bare = [text.replace(rb"\\", b"").replace(rb"\"", b"") for text in texts]
    quotes = _quotes(bare)
    if quotes <= 2 * MAX_STRINGS:
        bare = [b"".join(text.split(b'"')[::2]) for text in bare]
    excess = _excess(bare, quotes)
    if excess:
        where = "the body" if param is None else f"'{param}'"
        raise invalid(param, f"{where} has {excess} are allowed; send less at a time")


def size_of(value: Any) -> int:
    """Return about what decoded JSON takes in memory, in bytes."""
    total, level = 0, [value]
    while level:
        below: list[Any] = []
        for one in level:
            total += sys.getsizeof(one)
            if isinstance(one, dict):
                below.extend(one)
                below.extend(one.values())
            elif isinstance(one, list | tuple):
                below.extend(one)
            elif isinstance(one, msgspec.Struct):
                below.extend(getattr(one, name) for name in one.__struct_fields__)
        level = below
    return total


def _quotes(texts: Sequence[bytes]) -> int:
    return sum(text.count(b'"') for text in texts)


def _excess(texts: Sequence[bytes], quotes: int) -> str:
    """Return what there is too much of, if anything."""
    if quotes > 2 * MAX_STRINGS:
        return f"{quotes // 2} strings; at most {MAX_STRINGS}"
    nested = sum(text.count(b"[") + text.count(b"{") for text in texts)
    if nested > MAX_NESTED:
        return f"{nested} objects and lists; at most {MAX_NESTED}"
    values = sum(text.count(b",") for text in texts)
    return f"{values} values; at most {MAX_VALUES}" if values > MAX_VALUES else ""
