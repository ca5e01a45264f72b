"""Streams over real sockets: frames, pings, usage, errors in the middle, clients that go away."""

import json
import socket
import threading
import time
from contextlib import closing

import httpx
import pytest
from openai import APIStatusError, OpenAI
from openai.types.chat import ChatCompletionChunk

from tests.support.fake_instance import wait_until
from tests.support.proxy_server import NOT_WAITED, TEXT, Proxy, listening

HEAD = (
    "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n"
)
HELLO = [{"role": "user", "content": "hello"}]
CHAT = {"model": "m", "messages": HELLO}


@pytest.fixture
def proxy(tmp_path):
    return Proxy(tmp_path)


@pytest.fixture
def address(proxy):
    with listening(proxy) as address:
        yield address


@pytest.fixture
def client(address):
    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


def stream_lines(address, body, path="/v1/chat/completions"):
    """Yield the stream's lines as they come; the first item is the response itself."""
    with (
        httpx.Client(base_url=address, timeout=30) as client,
        client.stream("POST", path, json={**body, "stream": True}) as response,
    ):
        yield response
        yield from (line for line in response.iter_lines() if line)


def frames_of(lines):
    """Check a whole stream's frames and return them decoded."""
    lines = [line for line in lines if not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    frames = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert all("choices" in frame or "error" in frame for frame in frames)
    return frames


def test_a_streamed_chat_is_what_clients_expect(proxy, address):
    response, *lines = stream_lines(address, CHAT)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-request-id"]
    frames = frames_of(lines)
    for frame in frames:
        ChatCompletionChunk.model_validate(frame)
        assert "usage" not in frame
    assert len({(frame["id"], frame["created"]) for frame in frames}) == 1
    deltas = [frame["choices"][0]["delta"] for frame in frames]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == TEXT
    finishes = [frame["choices"][0]["finish_reason"] for frame in frames]
    assert finishes[-1] == "stop"
    assert set(finishes[:-1]) == {None}
    assert frames[-1]["aegaeon"] == NOT_WAITED


def test_usage_comes_in_one_more_chunk_when_asked(proxy, address):
    body = {**CHAT, "stream_options": {"include_usage": True}}
    _, *lines = stream_lines(address, body)
    *frames, last = frames_of(lines)
    assert all(frame["usage"] is None for frame in frames)
    assert last["choices"] == []
    prompt = len(proxy.text.encode_chat(HELLO))
    made = len(proxy.answer) + 1
    assert last["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_running_usage_is_in_every_chunk_when_asked(address):
    options = {"include_usage": True, "continuous_usage_stats": True}
    _, *lines = stream_lines(address, {**CHAT, "stream_options": options})
    counts = [frame["usage"]["completion_tokens"] for frame in frames_of(lines) if frame["usage"]]
    assert counts == sorted(counts)
    assert counts[0] >= 1


def test_the_openai_client_reads_chats(client):
    whole = client.chat.completions.create(**CHAT)
    assert whole.choices[0].message.content == TEXT
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(**CHAT, stream=True)
    ]
    assert "".join(pieces) == TEXT


def test_the_openai_client_reads_completions(client):
    body = {"model": "m", "prompt": ["a", "b"], "max_tokens": 200, "n": 2}
    whole = client.completions.create(**body)
    assert [choice.text for choice in whole.choices] == [TEXT] * 4
    texts = [""] * 4
    for chunk in client.completions.create(**body, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [TEXT] * 4


def test_the_openai_client_lists_models_and_reads_errors(client):
    assert [model.id for model in client.models.list()] == ["m", "org/other"]
    assert client.models.retrieve("org/other").id == "org/other"
    with pytest.raises(APIStatusError) as caught:
        client.chat.completions.create(model="gone", messages=HELLO, stream=True)
    assert (caught.value.status_code, caught.value.code) == (404, "model_not_found")
    assert caught.value.param == "model"


def test_choices_of_a_stream_come_by_index(address):
    _, *lines = stream_lines(address, {**CHAT, "n": 3})
    texts, finishes, roles = [""] * 3, [None] * 3, [0] * 3
    for frame in frames_of(lines):
        (choice,) = frame["choices"]
        at = choice["index"]
        texts[at] += choice["delta"].get("content", "")
        finishes[at] = finishes[at] or choice["finish_reason"]
        roles[at] += "role" in choice["delta"]
    assert (texts, finishes, roles) == ([TEXT] * 3, ["stop"] * 3, [1] * 3)


def test_a_stop_string_never_shows_in_a_stream(proxy, address):
    _, *lines = stream_lines(address, {**CHAT, "stop": "größer als 世"})
    frames = frames_of(lines)
    text = "".join(frame["choices"][0]["delta"].get("content", "") for frame in frames)
    assert text == TEXT.split("größer")[0]
    assert frames[-1]["choices"][0]["finish_reason"] == "stop"


def test_pings_come_while_a_request_waits(proxy, address):
    proxy.instance.hold_after = 0
    started_s = time.monotonic()
    lines = stream_lines(address, CHAT)
    response = next(lines)
    assert response.status_code == 200
    assert next(lines) == ": ping"
    assert time.monotonic() - started_s < 60
    proxy.instance.release()
    frames_of(lines)


def test_pings_come_while_tokens_have_no_text(proxy, address, monkeypatch):
    monkeypatch.setattr("aegaeon.proxy.streams.PING_S", 0.3)
    instance = proxy.instance
    instance.reply = lambda _: (1,) * 40  # a mark, which is not shown
    instance.hold_after = 1
    told = []

    def read():
        told.extend(list(stream_lines(address, {**CHAT, "ignore_eos": True, "max_tokens": 40}))[1:])

    reading = threading.Thread(target=read)
    reading.start()
    for count in range(2, 12):
        time.sleep(0.15)
        instance.hold_after = count
        instance._mailbox.wake()
    instance.release()
    reading.join(20)
    assert told.count(": ping") >= 3
    assert frames_of(told)[-1]["choices"][0]["finish_reason"] == "length"


def test_an_error_in_the_middle_is_a_frame_and_done(tmp_path):
    proxy = Proxy(tmp_path, request_timeout_s=0.6)
    with listening(proxy) as address:
        proxy.instance.hold_after = 3
        response, *lines = stream_lines(address, CHAT)
    assert response.status_code == 200
    frames = frames_of(lines)
    assert frames[-1]["error"]["code"] == "timeout"
    assert set(frames[-1]["error"]) == {"message", "type", "param", "code"}


def test_a_stream_survives_its_instance(proxy, address):
    proxy.instance.hold_after = 7
    lines = stream_lines(address, {**CHAT, "stream_options": {"include_usage": True}})
    response, first = next(lines), next(lines)
    assert response.status_code == 200
    wait_until(lambda: proxy.instance.submitted)
    proxy.add_instance(id="instance-1")
    proxy.instances.pop(0).die()
    *frames, last = frames_of([first, *lines])
    text = "".join(frame["choices"][0]["delta"].get("content", "") for frame in frames)
    assert text == TEXT
    assert frames[-1]["aegaeon"]["instance"] == "instance-1"
    assert last["usage"]["completion_tokens"] == len(proxy.answer) + 1


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("hold_after", [0, 4])
def test_a_client_that_goes_away_cancels_its_work(proxy, address, stream, hold_after):
    proxy.instance.hold_after = hold_after
    body = json.dumps({**CHAT, "stream": stream, "n": 2}).encode()
    head = HEAD.format(len(body))
    url = httpx.URL(address)
    with closing(socket.create_connection((url.host, url.port))) as connection:
        connection.sendall(head.encode() + body)
        wait_until(lambda: len(proxy.instance.submitted) == 2)
    wait_until(lambda: len(proxy.instance.cancelled) == 2)
    assert proxy.service.gateway.open_requests == 0


def test_a_client_that_goes_away_before_dispatch_leaves_nothing(proxy, address):
    proxy.instance.publish("starting")
    wait_until(lambda: not proxy.service.gateway.is_ready())
    gateway = proxy.service.gateway
    body = json.dumps(CHAT).encode()
    head = HEAD.format(len(body))
    url = httpx.URL(address)
    with closing(socket.create_connection((url.host, url.port))) as connection:
        connection.sendall(head.encode() + body)
        wait_until(lambda: gateway.open_requests == 1)
    wait_until(lambda: gateway.open_requests == 0)
    assert not proxy.instance.submitted


def test_requests_in_flight_at_once_do_not_mix(proxy, address):
    results = []

    def one(model):
        _, *lines = stream_lines(address, {**CHAT, "model": model})
        results.append((model, frames_of(lines)))

    threads = [threading.Thread(target=one, args=(m,)) for m in ("m", "org/other") * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(results) == 8
    for model, frames in results:
        assert {frame["model"] for frame in frames} == {model}
        text = "".join(frame["choices"][0]["delta"].get("content", "") for frame in frames)
        assert text == TEXT
