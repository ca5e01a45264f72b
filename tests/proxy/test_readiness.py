"""GET /health/ready: along the way a request takes, whatever holds it up."""

import asyncio

import pytest

from aegaeon.store.local import RECORD_OVERHEAD_BYTES
from tests.support.proxy_server import Proxy, in_memory


@pytest.fixture
def proxy(tmp_path, monkeypatch):
    monkeypatch.setattr("aegaeon.proxy.questions.ANSWER_S", 0.2)
    monkeypatch.setattr("aegaeon.proxy.readiness.FRESH_S", 0.0)
    return Proxy(tmp_path)


def reasons(proxy, before=lambda: None, answers=True):
    """Return what readiness says after `before`."""

    async def whole():
        async with in_memory(proxy) as client:
            proxy.instance.decisions = [] if answers else None
            await asyncio.sleep(0.15)  # the table has been looked at
            before()
            await asyncio.sleep(0.25)
            answer = await client.get("/health/ready")
            body = answer.json()
            assert answer.status_code == (503 if body["reasons"] else 200)
            assert body["status"] == ("unready" if body["reasons"] else "ready")
            return body["reasons"]

    return asyncio.run(asyncio.wait_for(whole(), 60))


def test_a_server_whose_instances_answer_is_ready(proxy):
    assert reasons(proxy) == []


def test_a_wrong_configuration_is_told_and_leaves_it_ready(proxy):
    async def whole():
        async with in_memory(proxy) as client:
            proxy.service.complaint = "the configuration file is not valid"
            return await client.get("/health/ready")

    answer = asyncio.run(asyncio.wait_for(whole(), 60))
    assert (answer.status_code, answer.json()["status"]) == (200, "ready")
    assert answer.json()["reasons"] == ["the configuration file is not valid"]


def test_an_instance_that_does_not_answer_is_named(proxy):
    assert reasons(proxy, answers=False) == ["instance-0 does not answer"]


def test_an_instance_whose_mailbox_is_full_is_named(proxy):
    def fill():
        proxy.instance.hang()
        mailbox = proxy.domain.open_mailbox("instance-0-1")
        for _ in range(4):
            mailbox.send(b"x" * ((1 << 20) - RECORD_OVERHEAD_BYTES))

    assert reasons(proxy, fill) == ["instance-0 does not answer"]


def test_an_instance_that_says_it_is_stuck_is_named(proxy):
    told = reasons(proxy, lambda: proxy.instance.publish("stuck"))
    assert told == [
        "instance-0 is stuck and will be restarted",
        "no instance takes requests: instance-0 is stuck",
    ]


@pytest.mark.parametrize("state", ["starting", "draining"])
def test_without_an_instance_that_takes_requests_it_is_not_ready(proxy, state):
    told = reasons(proxy, lambda: proxy.instance.publish(state))
    assert told == [f"no instance takes requests: instance-0 is {state}"]


def test_one_of_several_that_is_gone_leaves_it_ready(proxy):
    def leave():
        proxy.add_instance(id="instance-1").decisions = []
        proxy.instances[0].die()

    assert reasons(proxy, leave) == []


def test_a_draining_server_says_so_at_once(proxy):
    def drain():
        proxy.service.is_draining = True

    assert reasons(proxy, drain) == ["the server is about to stop"]


def test_a_table_that_cannot_be_read_is_told(proxy, monkeypatch):
    monkeypatch.setattr("aegaeon.proxy.readiness.TABLE_S", 0.1)

    def break_it():
        proxy.service.gateway._seen_s -= 100.0
        for watcher in proxy.service.gateway._watchers:
            watcher.cancel()

    (told,) = reasons(proxy, break_it)
    assert told.startswith("the table has not been readable for 100 s")


def test_a_request_that_waits_for_too_long_is_told(proxy):
    async def whole():
        async with in_memory(proxy) as client:
            proxy.instance.decisions = []
            proxy.instance.hold_after = 0
            body = {"model": "m", "prompt": "x"}
            asking = asyncio.create_task(client.post("/v1/completions", json=body))
            while not proxy.service.gateway.open_requests:
                await asyncio.sleep(0.01)
            proxy.service._readiness._wait_bound_s = 0.01
            await asyncio.sleep(0.05)
            answer = await client.get("/health/ready")
            proxy.instance.release()
            await asking
            return answer.json()["reasons"]

    (told,) = asyncio.run(asyncio.wait_for(whole(), 60))
    assert told.startswith("a request for m has waited") and told.endswith("its first token")


def test_however_many_ask_the_instances_are_asked_once(proxy, monkeypatch):
    monkeypatch.setattr("aegaeon.proxy.readiness.FRESH_S", 60.0)

    async def whole():
        async with in_memory(proxy) as client:
            proxy.instance.decisions = []
            answers = await asyncio.gather(*(client.get("/health/ready") for _ in range(30)))
            return [answer.status_code for answer in answers]

    assert asyncio.run(asyncio.wait_for(whole(), 60)) == [200] * 30
    assert len(proxy.instance.asked) == 1
