"""The page in headless Chromium, beside a real server."""

import json
import os
import re
import signal

import pytest
from playwright.sync_api import expect

from tests.support.browser import needs_browser, opened
from tests.support.server import Server, Streamed

pytestmark = needs_browser
ANSWER_MS = 60_000


@pytest.fixture(scope="module")
def server(checkpoints, tmp_path_factory):
    with Server(tmp_path_factory.mktemp("server"), checkpoints, "--colocated-count", "2") as server:
        yield server


def names_in(page):
    return [row.split("\t")[0] for row in page.locator("#model-rows tr").all_inner_texts()]


def test_the_page_shows_models_lanes_and_decisions(server):
    with opened(server.url) as page:
        streams = [Streamed(server.url, name, "the device", 300) for name in ("ada", "bob")]
        expect(page.locator("#status")).to_have_text(re.compile("^ok"))
        expect(page.locator("#model-rows tr")).to_have_count(3)
        assert names_in(page) == ["ada", "bob", "cleo"]
        lanes = page.locator("#lanes")
        expect(lanes).to_contain_text("instance-0")
        expect(lanes).to_contain_text("ada", timeout=ANSWER_MS)
        expect(lanes).to_contain_text("bob")
        expect(page.locator("#decision-rows")).to_contain_text("decode")
        for stream in streams:
            stream.whole()
        expect(page.locator("#lanes-words")).to_contain_text("switches")


def test_two_models_answer_side_by_side(server):
    with opened(server.url) as page:
        expect(page.locator("#model-1 option")).to_have_count(3)
        page.get_by_label("First model").select_option("ada")
        page.get_by_label("Second model").select_option("cleo")
        page.get_by_label("Tokens at most").fill("12")
        page.get_by_role("button", name="Ask both").click()
        for pane in (0, 1):
            figures = page.locator(f"#figures-{pane}")
            expect(figures).to_have_text(re.compile("^done.*12 tokens"), timeout=ANSWER_MS)
        expect(page.get_by_role("button", name="Ask both")).to_be_enabled()


def endless(route):
    """Send what the page asks so that the answer goes on to the limit, whatever is drawn."""
    route.continue_(post_data=json.dumps({**route.request.post_data_json, "ignore_eos": True}))


def test_an_answer_can_be_stopped(server):
    with opened(server.url) as page:
        page.route("**/v1/chat/completions", endless)
        expect(page.locator("#model-0 option")).to_have_count(3)
        page.get_by_label("Tokens at most").fill("4000")
        page.get_by_role("button", name="Ask both").click()
        expect(page.locator("#figures-0")).to_contain_text("first token", timeout=ANSWER_MS)
        # However long a busy machine takes to the click, the answer is not over by then.
        instances = list(server.instance_pids().values())
        for pid in instances:
            os.kill(pid, signal.SIGSTOP)
        try:
            page.get_by_role("button", name="Stop").click()
            expect(page.locator("#figures-0")).to_have_text(re.compile("^stopped"))
        finally:
            for pid in instances:
                os.kill(pid, signal.SIGCONT)
        expect(page.locator("#status")).to_have_text(re.compile("0 open requests"))


@pytest.mark.thorough
def test_what_had_come_before_a_stop_is_no_end(server):
    """Many chunks at once, as a browser has them that was busy: the end is among them."""
    chunk = {"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": None}]}
    frames = f"data: {json.dumps(chunk)}\n\n" * 3 + "data: [DONE]\n\n"
    with opened(server.url) as page:
        expect(page.locator("#model-0 option")).to_have_count(3)
        page.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(content_type="text/event-stream", body=frames),
        )
        page.evaluate(
            """() => new MutationObserver(() => document.getElementById("stop").click()).observe(
                document.getElementById("answer-0"), { childList: true })"""
        )
        page.get_by_role("button", name="Ask both").click()
        expect(page.locator("#figures-0")).to_have_text(re.compile("^stopped"))


@pytest.mark.thorough
def test_errors_are_told_where_they_happen(server):
    with opened(server.url) as page:
        expect(page.locator("#model-0 option")).to_have_count(3)
        page.get_by_label("Tokens at most").fill("4096")
        page.get_by_role("button", name="Ask both").click()
        answer = page.locator("#answer-0")
        expect(answer).to_have_class("failed")
        expect(answer).to_contain_text("the context of ada is 4096 tokens")


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.thorough)])
def test_it_follows_the_system_until_told_otherwise(server, scheme):
    other = {"light": "dark", "dark": "light"}[scheme]
    with opened(server.url, scheme=scheme) as page:
        root = page.locator("html")
        expect(root).to_have_attribute("data-theme", scheme)
        page.get_by_role("button", name="Light or dark").click()
        expect(root).to_have_attribute("data-theme", other)
        page.reload()
        expect(root).to_have_attribute("data-theme", other)


@pytest.mark.thorough
def test_a_narrow_screen_scrolls_one_way_only(server):
    with opened(server.url, width=360) as page:
        expect(page.locator("#model-rows tr")).to_have_count(3)
        expect(page.locator("#lanes .main-svg").first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.thorough
def test_everything_is_reached_by_the_keyboard(server):
    with opened(server.url) as page:
        expect(page.locator("#model-rows tr")).to_have_count(3)
        reached = set()
        for _ in range(40):
            page.keyboard.press("Tab")
            reached.add(
                page.evaluate("document.activeElement.id || document.activeElement.innerText")
            )
        assert {"key", "theme", "window", "pause", "prompt", "max-tokens", "ask"} <= reached
        assert {"model-0", "model-1"} <= reached
        page.locator("#prompt").focus()
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", (
            "what has the focus shows it"
        )


def test_the_page_delays_and_loads_nothing(server):
    before = server.switches()
    with opened(server.url) as page:
        expect(page.locator("#model-rows tr")).to_have_count(3)
        page.wait_for_timeout(2500)
    assert server.switches() == before


@pytest.mark.thorough
def test_models_that_take_turns_have_shares_of_their_time_in_the_lane(server):
    told = [
        {"action": action, "model": model, "at_s": at_s, "until_s": until_s}
        for action, model, at_s, until_s in (
            ("prefill", "ada", 9.0, 9.0),
            ("switch", "ada", 10.0, 10.9),
            ("decode", "ada", 10.01, 11.0),
            ("switch", "bob", 10.02, 10.95),
            ("decode", "bob", 10.03, 10.98),
            ("decode", "cleo", 11.5, 12.0),
        )
    ]
    decisions = [{"instance": "i", "decision": one} for one in told]
    with opened(server.url) as page:
        lane = page.evaluate(
            "async (told) => (await import('/static/spans.js')).toSpans(told, 20).get('i')",
            decisions,
        )
    spans = [(one["model"], one["start"], one["end"]) for one in lane["spans"]]
    assert spans == [
        ("ada", 9.0, 10.0),
        ("ada", 10.0, pytest.approx(10.5)),
        ("bob", pytest.approx(10.5), 11.5),
        ("cleo", 11.5, 12.0),
    ]
    assert [one["model"] for one in lane["switches"]] == ["ada", "bob"]
