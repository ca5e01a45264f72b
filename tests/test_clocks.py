"""Times between machines: by arithmetic, and between two real clocks of one machine."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from aegaeon.clocks import ahead_s, brought_here, brought_there
from aegaeon.config import Settings
from aegaeon.explanations import Decision, Explain, Explained
from aegaeon.instance.launch import Launch
from aegaeon.proxy.outbox import Outbox
from aegaeon.store.base import Mailbox
from aegaeon.store.codec import decode_replies
from aegaeon.store.redis import RedisDomain
from aegaeon.types import Reply, TokenEvent
from tests.support.polling import eventually
from tests.support.redis_server import RedisServer, require_redis
from tests.support.specs import make_request, make_spec

LATER_S = 500_000  # beyond what any machine of ours has been up


def test_times_written_here_stay_and_others_move():
    request = make_request("r", "m", arrival_s=100.0, deadline_s=160.0)
    assert brought_here(request, None) is request
    assert brought_here(request, ahead_s()) is request
    moved = brought_here(request, ahead_s() - 1000.0)  # a machine that has been up for longer
    assert moved.arrival_s == pytest.approx(-900.0, abs=0.01)
    assert moved.deadline_s - moved.arrival_s == pytest.approx(60.0)
    decision = Decision(5.0, 7.0, "switch", "m", (), (), "only_one", 1)
    (told,) = brought_there((decision,), ahead_s() - 1000.0)
    assert (told.at_s, told.until_s) == pytest.approx((1005.0, 1007.0), abs=0.01)


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    require_redis()
    server = RedisServer(tmp_path)
    server.start(persistent=False)
    yield Settings(
        domain=f"clocks-{time.monotonic_ns()}",
        device="null",
        metadata_backend="redis",
        redis_url=server.url,
    )
    server.kill()


@pytest.fixture
def later(settings: Settings) -> Iterator["subprocess.Popen[bytes]"]:
    """An instance whose monotonic clock is ahead of ours, as another machine's may be."""
    clock = ["unshare", "--time", "--monotonic", str(LATER_S)]
    try:
        probe = [*clock, sys.executable, "-c", "import time; print(time.monotonic())"]
        shown = subprocess.run(probe, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no clock of its own can be had here ({error})")
    assert float(shown) > time.monotonic() + LATER_S / 2
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [*clock, sys.executable, "-m", "aegaeon.instance.worker"],
        stdin=subprocess.PIPE,
        pass_fds=(writing,),
    )
    os.close(writing)
    launch = Launch(
        settings=settings,
        specs=(make_spec("m"),),
        instance="instance-0",
        index=0,
        incarnation=1,
        status_fd=writing,
        parent_pid=os.getpid(),
    )
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(launch))
    process.stdin.close()
    yield process
    process.kill()
    process.wait(10)
    os.close(reading)


def test_an_instance_with_another_clock_keeps_deadlines_and_tells_by_ours(settings, later):
    domain = RedisDomain(settings.domain_name, settings.redis_url)
    inbox = domain.create_mailbox("tester")
    eventually(
        lambda: [r for r in domain.metadata().sync_for_routing() if r.status.state == "ready"],
        within_s=60,
    )
    outbox, now = Outbox(domain, settings), time.monotonic()
    request = make_request(
        "r", "m", reply_to="tester", arrival_s=now, deadline_s=now + 60, max_tokens=3
    )
    assert outbox.submit(request, frozenset()) is not None
    replies = received(inbox, 3)
    assert [type(reply) for reply in replies] == [TokenEvent] * 3
    assert replies[-1].waited.queue_s < 30

    question = Explain(ticket=1, reply_to="tester", request=None, model=None, limit=10)
    outbox.ask(question, None)
    (told,) = received(inbox, 1)
    assert isinstance(told, Explained)
    assert now - 60 < told.decisions[-1].at_s < time.monotonic() + 1
    # And one whose time is over is over there, too.
    late = make_request("s", "m", reply_to="tester", arrival_s=now - 9, deadline_s=now - 1)
    outbox.submit(late, frozenset())
    (failed,) = received(inbox, 1)
    assert failed.code == "timeout"
    outbox.close()
    domain.close()


def received(inbox: Mailbox, count: int) -> list[Reply | Explained]:
    found: list[Reply | Explained] = []
    deadline_s = time.monotonic() + 20
    while len(found) < count:
        assert time.monotonic() < deadline_s, found
        found += [one for record in inbox.receive(0.2) for one in decode_replies(record)]
    return found
