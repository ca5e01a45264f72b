"""A headless Chromium, by Playwright: pages of it, and what they complained of."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import ConsoleMessage, Page, sync_playwright

BINARY = shutil.which("chromium") or shutil.which("chromium-browser")
# Chromium says it of every answer that is not a success, also of those that are expected.
_EXPECTED = re.compile(r"Failed to load resource: the server responded with a status of 4")

needs_browser = pytest.mark.skipif(BINARY is None, reason="no Chromium here; install chromium")


@contextmanager
def opened(url: str, *, scheme: str = "light", width: int = 1280) -> Iterator[Page]:
    """Yield a page of `url`; at the end, fail for any error in it and for any foreign host that it
    asked."""
    troubles: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BINARY, args=["--no-sandbox"])
        context = browser.new_context(
            color_scheme=scheme, viewport={"width": width, "height": 900}, reduced_motion="reduce"
        )
        page = context.new_page()
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on(
            "console", lambda said: troubles.append(said.text) if said.type == "error" else None
        )
        page.on("request", lambda asked: _note_foreign(asked.url, url, troubles))
        page.goto(url)
        yield page
        browser.close()
    assert [trouble for trouble in troubles if not _EXPECTED.match(trouble)] == []


def _note_error(said: ConsoleMessage, troubles: list[str]) -> None:
    if said.type == "error":
        troubles.append(said.text)


def _note_foreign(asked: str, url: str, troubles: list[str]) -> None:
    if not asked.startswith((url, "data:", "blob:")):
        troubles.append(f"asked {asked}")
