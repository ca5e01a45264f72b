"""The command that tells why a request was served as it was."""

import re
from pathlib import Path

import httpx
import msgspec
import pytest

from aegaeon import explain
from aegaeon.cli import main
from aegaeon.explain import REASONS, story
from aegaeon.explanations import At, Decision, Dispatched, Explanation
from tests.support.proxy_server import Proxy, listening

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def decision(at_s, action, reason, requests=(), until_s=None, **changes):
    fields = {"model": "m", "evicted": (), "times": 1, **changes}
    until_s = at_s if until_s is None else until_s
    return At(
        "i0",
        Decision(at_s=at_s, until_s=until_s, action=action, requests=requests, reason=reason,
                 **fields),
    )  # fmt: skip


FOUND = Explanation(
    now_s=130.0,
    dispatched=(
        Dispatched(
            at_s=100.001, arrival_s=100.0, request="x.0", attempt=0, model="m", instance="i0",
            reason="home", excluded=("i1",),
        ),
    ),
    decisions=(
        decision(90.0, "load", "least_slack_absent"),
        decision(100.002, "load", "makes_way", evicted=("n",)),
        decision(102.0, "switch", "least_slack"),
        decision(102.1, "prefill", "least_slack", ("x.0", "y.0")),
        decision(102.2, "decode", "least_slack", ("x.0",), 103.2, times=50),
        decision(110.0, "switch", "least_slack"),
    ),
    silent=("i2",),
)  # fmt: skip


def test_a_story_counts_from_the_arrival_and_ends_with_the_request():
    lines = list(story(FOUND, "x"))
    assert lines[0] == "request x, which came 30.0 s ago"
    assert "+0.001s  sent to i0: requests of its model are there (home)" in lines[1]
    assert lines[1].endswith("not to i1, which took nothing or ended")
    assert "+0.002s  i0: load of m begins in the place of n: who computed is well" in lines[2]
    assert "(1.998 s without a decision" in lines[3]
    assert "+2.100s  i0: prefill with 1 other: " in lines[5]
    assert "+2.200s  i0: decode, 50 steps in 1.000 s: " in lines[6]
    assert lines[7] == "without i2, which did not answer in time"


def test_every_reason_of_the_policies_has_a_sentence():
    sources = (Path(explain.__file__).parent / "scheduler").glob("*.py")
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    codes = set(re.findall(r'_reason = "(\w+)"', text))
    assert codes and codes <= set(REASONS)


@pytest.fixture
def server(tmp_path):
    with listening(Proxy(tmp_path)) as url:
        yield url


def test_the_story_is_asked_of_a_server(server, capsys):
    url = server
    answer = httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=20).json()
    assert main(["explain", answer["id"], "--url", url]) == 0
    assert "sent to instance-0: it is the only instance" in capsys.readouterr().out
    assert main(["explain", answer["id"], "--url", url, "--json"]) == 0
    assert msgspec.json.decode(capsys.readouterr().out, type=Explanation).dispatched


def test_what_cannot_be_told_says_why(server, capsys):
    url = server
    assert main(["explain", "chatcmpl-0", "--url", url]) == 1
    assert "nothing is remembered of request 'chatcmpl-0'" in capsys.readouterr().err
    assert main(["explain", "x", "--url", "http://127.0.0.1:1"]) == 1
    assert "no server answers at http://127.0.0.1:1" in capsys.readouterr().err
    assert main(["explain", "x", "--url", "ftp://x"]) == 2
    assert main(["explain"]) == 2
