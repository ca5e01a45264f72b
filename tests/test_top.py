"""`aegaeon top`: what the server says, as tables and as JSON."""

import io
import json

import pytest
from rich.console import Console

from aegaeon.errors import ConfigError, StoreUnavailable
from aegaeon.proxy.status import InstanceNow, ModelNow, Quantiles, Status
from aegaeon.top import fetch, picture, top_command
from tests.support.proxy_server import Proxy, listening

STATUS = Status(
    open_requests=3,
    slo_ttft_s=10.0,
    slo_tbt_s=0.1,
    instances=(
        InstanceNow(
            id="instance-0",
            state="stuck",
            role="colocated",
            device="cpu",
            current="chat",
            loading=None,
            resident=("chat",),
            waiting=2,
            running=1,
            switches=7,
            restarts=1,
            stall_s=0.5,
            weight_bytes=1_500_000_000,
            weight_budget_bytes=4_000_000_000,
            kv_bytes=250_000_000,
            kv_budget_bytes=1 << 62,
        ),
    ),
    models=tuple(
        ModelNow(
            id=name,
            status="running",
            tier="device",
            waiting=waiting,
            running=1,
            oldest_wait_s=2.5,
            ttft_s=Quantiles(0.5, 12.0),
            tbt_s=Quantiles(None, None),
            slo_ttft_s=10.0,
            slo_tbt_s=0.1,
            tokens_per_s=33.3,
            finished=5,
            failed=1,
            attained=attained,
        )
        for name, waiting, attained in (("quiet", 0, None), ("chat", 2, 0.875))
    ),
)


def shown(parts, width=160):
    console = Console(width=width, force_terminal=True, color_system="standard", file=io.StringIO())
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    return capture.get()


def test_the_tables_say_what_the_server_says():
    text = shown([picture(STATUS)])
    instance = next(x for x in text.splitlines() if "instance-0" in x)
    for word in ("stuck", "chat", "1.50/4.00", "0.25", "7"):
        assert word in instance
    assert "/4611" not in instance  # no bounds, no share of them
    chat, quiet = (next(x for x in text.splitlines() if x.startswith(n)) for n in ("chat", "quiet"))
    assert text.index(chat) < text.index(quiet)  # the busiest first
    assert "88%" in chat and "33.3" in chat and "2.5" in chat
    assert "\x1b[31m12" in chat and "0.5" in chat  # late is red


@pytest.fixture
def address(tmp_path):
    with listening(Proxy(tmp_path)) as address:
        yield address


def test_a_server_is_shown_once_or_as_json(address):
    frames, is_live = top_command(["--url", address, "--once"])
    assert not is_live
    text = shown(frames)
    assert "instance-0" in text and "org/other" in text
    (body,) = top_command(["--url", address, "--json"])[0]
    assert [one["id"] for one in json.loads(body)["models"]] == ["m", "org/other"]


def test_a_server_that_goes_away_is_waited_for(address, monkeypatch):
    monkeypatch.setattr("aegaeon.top.INTERVAL_S", 0.0)
    frames, is_live = top_command(["--url", address])
    assert is_live and "instance-0" in shown([next(frames)])
    monkeypatch.setattr("aegaeon.top.fetch", lambda *_: fetch("http://127.0.0.1:1"))
    assert "no server answers" in shown([next(frames)])
    monkeypatch.undo()
    assert "instance-0" in shown([next(frames)])


@pytest.mark.parametrize("url", ["ftp://x", "localhost:8080"])
def test_a_bad_url_is_refused(url):
    with pytest.raises(ConfigError, match="--url"):
        top_command(["--url", url])


def test_nobody_there_is_an_error_with_a_remedy():
    with pytest.raises(StoreUnavailable, match="--url"):
        list(top_command(["--url", "http://127.0.0.1:1", "--once"])[0])
