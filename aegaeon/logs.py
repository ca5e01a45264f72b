"""How a process writes its log on stderr: lines for people, or an object of JSON for each event.

Messages are written as `what happened name=%s other=%d`: as JSON the names become fields with their
values, whole. `request_id` is that of the HTTP request at hand, where there is one.
"""

import contextvars
import json
import logging
import re
import time
from typing import Any, Literal

LogFormat = Literal["text", "json"]

REQUEST_ID: "contextvars.ContextVar[str]" = contextvars.ContextVar("request_id", default="")

# Of a message or a field: either may repeat what a client sent.
MAX_CHARS = 8192

# A placeholder, and the name before it, if it has one.
_PLACE = re.compile(r"(?:\b(\w+)=)?%[-+ #0]*[\d.]*[diouxXeEfFgGcrsa]|%%")


def set_up(level: str, process: str, kind: LogFormat) -> None:
    """Write events of `level` and above, as those of `process`."""
    formatter: logging.Formatter = JsonLines(process)
    if kind == "text":
        names = "" if process == "supervisor" else " %(name)s"
        formatter = TextLines(f"%(asctime)s %(levelname)s {process}{names} %(message)s")
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler])


def set_level(level: str) -> None:
    """Write events of `level` and above from here on."""
    logging.getLogger().setLevel(level.upper())


class TextLines(logging.Formatter):
    """A line of text for each event."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line, without a trace."""
        record.message = shortened(record.message)
        return super().formatMessage(record)


class JsonLines(logging.Formatter):
    """A line of JSON for each event: time (UTC), level, process, logger, event, and its fields."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        event, fields = taken_apart(record)
        line: dict[str, Any] = {
            "time": f"{_clock(record.created)}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "event": shortened(event),
        }
        request_id = REQUEST_ID.get()
        if request_id:
            line["request_id"] = request_id
        # A field never hides what every line has.
        for key, value in fields.items():
            line[key if key not in line else f"{key}_"] = _bounded(value)
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def taken_apart(record: logging.LogRecord) -> tuple[str, dict[str, Any]]:
    """Return what happened, without its fields, and those with their values.

    The whole message where it is not of that form.
    """
    text, values = str(record.msg), record.args
    if not isinstance(values, tuple) or not values:
        return record.getMessage(), {}
    fields: dict[str, Any] = {}
    given = iter(values)

    def place(found: re.Match[str]) -> str:
        if found[0] == "%%":
            return "%"
        value = next(given)
        if found[1] is None:
            return found[0] % (value,)
        fields[found[1]] = value
        return ""

    try:
        event = _PLACE.sub(place, text)
    except (StopIteration, TypeError, ValueError):
        return record.getMessage(), {}
    return " ".join(event.split()).rstrip(";:, "), fields


def shortened(text: str) -> str:
    """Return `text`, or its beginning where it is long enough to fill a disk."""
    return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]}… ({len(text)} characters)"


def _bounded(value: Any) -> Any:
    """Return the value of a field as it is to be written."""
    if value is None or isinstance(value, bool | int | float):
        return value
    return shortened(str(value))


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
