"""GET /admin/decisions: what the proxy chose and the instances decided, over scripted instances."""

import asyncio

import pytest

from aegaeon.explanations import Decision
from tests.support.proxy_server import Proxy, in_memory

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
DECISION = Decision(1.0, 2.0, "decode", "m", ("r",), (), "least_slack", 9)


def run(proxy, test):
    async def whole():
        async with in_memory(proxy) as client:
            return await test(client)

    return asyncio.run(asyncio.wait_for(whole(), 60))


@pytest.fixture
def proxy(tmp_path):
    return Proxy(tmp_path)


def test_why_a_request_went_where_it_did_is_told_by_the_id_of_its_answer(proxy):
    async def test(client):
        proxy.instance.decisions = [DECISION]
        answer = (await client.post("/v1/chat/completions", json={**CHAT, "n": 2})).json()
        query = {"request": answer["id"]}
        return answer["id"], (await client.get("/admin/decisions", params=query)).json()

    name, told = run(proxy, test)
    assert [one["request"] for one in told["dispatched"]] == [f"{name}.0", f"{name}.1"]
    sent = told["dispatched"][0]
    assert (sent["instance"], sent["reason"], sent["model"]) == ("instance-0", "only_one", "m")
    assert sent["excluded"] == [] and sent["at_s"] >= sent["arrival_s"]
    (at,) = told["decisions"]
    assert at["instance"] == "instance-0" and at["decision"]["reason"] == "least_slack"
    assert told["silent"] == [] and proxy.instance.asked == [name]


def test_the_id_of_a_stream_is_known_too(proxy):
    async def test(client):
        body = {**CHAT, "stream": True}
        lines = (await client.post("/v1/chat/completions", json=body)).text.splitlines()
        name = lines[0].split('"id":"')[1].split('"')[0]
        return await client.get("/admin/decisions", params={"request": name})

    assert len(run(proxy, test).json()["dispatched"]) == 1


def test_an_instance_that_does_not_answer_is_named_and_waited_for_a_bounded_time(
    proxy, monkeypatch
):
    monkeypatch.setattr("aegaeon.proxy.questions.ANSWER_S", 0.1)

    async def test(client):
        proxy.instance.decisions = None
        return (await client.get("/admin/decisions")).json()

    assert run(proxy, test)["silent"] == ["instance-0"]


@pytest.mark.parametrize(
    ("query", "status", "words"),
    [
        ("request=nobody", 404, "nothing is remembered of request 'nobody'"),
        ("instance=i9", 404, "no instance 'i9' lives; living are: instance-0"),
        ("limit=0", 400, "from 1 to 1000"),
        ("limit=x", 400, "from 1 to 1000"),
        ("who=me", 400, "there is no 'who'"),
    ],
)
def test_questions_that_cannot_be_answered_say_why(proxy, query, status, words):
    response = run(proxy, lambda client: client.get(f"/admin/decisions?{query}"))
    assert response.status_code == status
    assert words in response.json()["error"]["message"]
