"""Events as lines of JSON: what happened, and its fields with their values."""

import ast
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from aegaeon.logs import MAX_CHARS, REQUEST_ID, JsonLines, TextLines, taken_apart

PACKAGE = Path(__file__).resolve().parents[1] / "aegaeon"


def record(message, *values, **more):
    made = logging.LogRecord("aegaeon.x", logging.INFO, "f", 1, message, values, None)
    for name, value in more.items():
        setattr(made, name, value)
    return made


def line(made):
    return json.loads(JsonLines("proxy").format(made))


@pytest.mark.parametrize(
    ("message", "values", "event", "fields"),
    [
        ("ready host=%s port=%d", ("::1", 80), "ready", {"host": "::1", "port": 80}),
        ("loaded took_s=%.3f of %s", (1.23456, "a"), "loaded of a", {"took_s": 1.23456}),
        ("90%% full bytes=%d", (7,), "90% full", {"bytes": 7}),
        ("nothing to say", (), "nothing to say", {}),
        ("100% of it", (), "100% of it", {}),
        ("declined request=%s by=%s: %s", ("r", "i", "no"), None, {"request": "r", "by": "i"}),
        ("%s error=%r", ("failed", None), "failed", {"error": None}),
    ],
)
def test_names_become_fields(message, values, event, fields):
    found = taken_apart(record(message, *values))
    assert found[1] == fields
    assert event is None or found[0] == event


def test_a_message_that_does_not_fit_its_values_is_told_whole():
    assert taken_apart(record("a=%(b)s", {"b": 1})) == ("a=1", {})


def test_a_line_has_time_level_process_logger_and_event():
    found = line(record("loading model=%s", "m", created=0.25, msecs=250.0))
    assert found == {
        **{"time": "1970-01-01T00:00:00.250Z", "level": "info", "process": "proxy"},
        **{"logger": "aegaeon.x", "event": "loading", "model": "m"},
    }


def test_a_field_hides_nothing_and_what_json_has_not_becomes_text():
    found = line(record("x event=%s path=%s", "y", Path("a")))
    assert (found["event"], found["event_"], found["path"]) == ("x", "y", "a")


def test_the_request_at_hand_is_named():
    token = REQUEST_ID.set("req-1")
    try:
        assert line(record("x"))["request_id"] == "req-1"
    finally:
        REQUEST_ID.reset(token)
    assert "request_id" not in line(record("x"))


def test_an_exception_keeps_its_trace_in_one_line():
    try:
        raise ValueError("bad\nworse")
    except ValueError:
        text = JsonLines("p").format(record("failed", exc_info=sys.exc_info()))
    assert "\n" not in text and "worse" in json.loads(text)["trace"]


def test_every_event_of_ours_can_be_taken_apart():
    """Each message's fields have distinct names, so that none is lost."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                is_log = isinstance(node.func.value, ast.Name) and node.func.value.id == "log"
                first = node.args[0] if node.args else None
                if is_log and isinstance(first, ast.Constant) and isinstance(first.value, str):
                    found.append((str(path), first.value))
    assert len(found) > 40
    for path, message in found:
        places = message.replace("%%", "").count("%")
        event, fields = taken_apart(record(message, *range(places)))
        named = message.count("=%")
        assert len(fields) == named, (path, message)
        assert event, (path, message)


def test_a_server_writes_nothing_but_json():
    command = [sys.executable, "-m", "aegaeon", "serve", "--device", "null", "--models", "x=/gone"]
    command += ["--log-format", "json", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    lines = [x for x in done.stderr.splitlines() if not x.startswith("aegaeon: error: ")]
    assert done.returncode != 0 and all(json.loads(x)["process"] for x in lines)


def test_what_a_client_sent_does_not_fill_a_disk():
    for given in ("x" * 10**6, ValueError("x" * 10**6), ["x" * 10**6]):
        made = record("request failed error=%s", given)
        for formatter in (JsonLines("proxy"), TextLines("%(message)s")):
            assert MAX_CHARS < len(formatter.format(made)) < 1.1 * MAX_CHARS
    assert TextLines("%(message)s").format(record("a=%d", 1)) == "a=1"
