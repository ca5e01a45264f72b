"""What the scripts of Python clients share. Each runs with its own packages, and without ours.

A script marks functions with `feature`; `main` calls them one by one and prints a JSON line each.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable

BASE_URL = os.environ["CONFORMANCE_URL"]  # of the server, without /v1
KEY = os.environ["CONFORMANCE_KEY"]
MODEL = os.environ["CONFORMANCE_MODEL"]  # speaks English
TOOL_MODEL = os.environ["CONFORMANCE_TOOL_MODEL"]  # has a template with tools, and random weights

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]

_features: list[tuple[str, Callable[[], None]]] = []


def feature(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Mark a function that raises where the feature does not work."""

    def mark(function: Callable[[], None]) -> Callable[[], None]:
        _features.append((name, function))
        return function

    return mark


def is_weather(arguments: str) -> None:
    """Raise unless `arguments` are those of WEATHER."""
    told = json.loads(arguments)
    assert set(told) == {"city", "unit"}, told
    assert told["unit"] in {"celsius", "fahrenheit"}, told


def is_person(text: str) -> None:
    """Raise unless `text` is a PERSON."""
    told = json.loads(text)
    assert set(told) == {"name", "age"} and isinstance(told["age"], int), told


def refused(call: Callable[[], object], kind: type[Exception], code: str | None) -> None:
    """Raise unless `call` raises `kind`, whose `code` is the one of OpenAI's error body."""
    try:
        call()
    except kind as error:
        got = getattr(error, "code", None)
        assert code is None or got == code, f"code {got!r}, not {code!r}"
    else:
        raise AssertionError(f"not refused as {kind.__name__}")


def main() -> None:
    """Call all features; print one line each."""
    for name, function in _features:
        began_s = time.monotonic()
        note = ""
        try:
            function()
        except Exception as error:  # one feature that fails is a line, and others go on
            traceback.print_exc(file=sys.stderr)
            note = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        took_s = round(time.monotonic() - began_s, 2)
        print(json.dumps({"feature": name, "ok": not note, "note": note, "took_s": took_s}))
        sys.stdout.flush()
