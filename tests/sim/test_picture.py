"""The picture of a run is one file that needs nothing else."""

import re

import pytest

from aegaeon.errors import ConfigError
from aegaeon.sim.timeline import Span

picture = pytest.importorskip("aegaeon.sim.picture", reason="Bokeh is not installed")

SPANS = [
    Span(0, "load", "first-model", 0.0, 1.0),
    Span(0, "switch", "first-model", 1.0, 1.005),
    Span(0, "prefill", "first-model", 1.005, 1.1),
    Span(1, "decode", "second-model", 0.5, 1.25),
]


def test_it_is_one_page_that_fetches_nothing():
    page = picture.draw(SPANS, "who ran")
    assert page.lstrip().startswith("<!DOCTYPE html>") and "<title>who ran</title>" in page
    assert re.findall(r"<(?:script|img|iframe)[^>]* src=|<link", page) == []
    assert len(page) < 4_000_000


def test_it_shows_every_span():
    page = picture.draw(SPANS, "who ran")
    for word in ("first-model", "second-model", "prefill", "decode", "switch", "load"):
        assert f'"{word}"' in page


def test_nothing_that_ran_is_a_picture_too():
    assert "<html" in picture.draw([], "nobody")


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot write .*nowhere"):
        picture.write_picture(tmp_path / "nowhere" / "x.html", SPANS, "who ran")
