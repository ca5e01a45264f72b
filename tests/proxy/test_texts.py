"""Text sides on demand: those that are asked for first, the loop free, clients told to wait."""

import asyncio
import contextlib
import json
import threading
import time
from types import SimpleNamespace

import httpx
import pytest

from aegaeon.errors import CheckpointError, ModelLoading
from aegaeon.models.here import TEXTS, Here
from aegaeon.proxy import encoders as made
from aegaeon.proxy.chat import ChatTemplate
from aegaeon.proxy.encoders import Encoders
from aegaeon.proxy.texts import Texts
from aegaeon.types import ModelSpec
from tests.support.proxy_server import Proxy, listening
from tests.support.tokenizer_files import byte_level, words, write


def spec_of(directory, name="m", vocab_tokens=400_000):
    return ModelSpec(
        id=name,
        path=str(directory),
        architecture="LlamaForCausalLM",
        weight_bytes=1,
        kv_token_bytes=1,
        context_tokens=64,
        vocab_tokens=vocab_tokens,
    )


def with_texts(test, **options):
    async def whole():
        texts = Texts(ChatTemplate, **options)
        try:
            return await test(texts)
        finally:
            await texts.close()

    return asyncio.run(asyncio.wait_for(whole(), 60))


@pytest.fixture
def held(monkeypatch):
    """Readings of tokenizers wait for `go`, and are noted."""

    held = SimpleNamespace(go=threading.Event(), began=[])

    def waiting(self, file, digest, read=Encoders.open):
        held.began.append(file.parent.name)
        assert held.go.wait(30)
        return read(self, file, digest)

    monkeypatch.setattr(Encoders, "open", waiting)
    yield held
    held.go.set()


def test_the_loop_turns_while_a_large_tokenizer_is_read(tmp_path):
    spec = spec_of(write(tmp_path / "large", byte_level(65_000)))

    async def test(texts):
        gaps, last = [], time.perf_counter()
        reading = asyncio.ensure_future(texts.get(spec))
        began_s = last
        while not reading.done():
            await asyncio.sleep(0.002)
            gaps.append(time.perf_counter() - last)
            last = time.perf_counter()
        assert (await reading).decode(tuple((await reading).encode("hello"))) == "hello"
        return max(gaps), last - began_s

    longest_s, took_s = with_texts(test)
    assert longest_s < took_s / 4  # it was all of it


def test_models_of_the_same_content_share_one_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr(made, "SMALL_BYTES", 0)
    specs = [spec_of(write(tmp_path / f"m{n}", words()), f"m{n}") for n in range(20)]

    async def test(texts):
        models = await asyncio.gather(*map(texts.get, specs))
        assert len(texts._encoders._processes) == 1
        assert len({id(model.vocabulary) for model in models}) == 1
        assert await texts.get(specs[3]) is models[3]
        texts.follow(specs[:1])
        assert texts.has(specs[0]) and not texts.has(specs[3])

    with_texts(test)


def test_processes_of_models_that_have_gone_end(tmp_path, monkeypatch):
    monkeypatch.setattr(made, "SMALL_BYTES", 0)
    specs = [spec_of(write(tmp_path / name, make()), name) for name, make in KINDS]

    async def test(texts):
        await asyncio.gather(*map(texts.get, specs))
        assert len(texts._encoders._processes) == 2
        texts.follow(specs[:1])
        assert len(texts._encoders._processes) == 1

    with_texts(test)


KINDS = (("a", words), ("b", byte_level))


def test_who_is_asked_for_comes_before_those_that_nobody_waits_for(tmp_path, held):
    specs = [spec_of(write(tmp_path / f"m{n}", byte_level(300 + n)), f"m{n}") for n in range(6)]

    async def test(texts):
        texts.follow(specs)
        while not held.began:
            await asyncio.sleep(0.01)
        asked = asyncio.ensure_future(texts.get(specs[5]))
        while len(held.began) < 2:
            await asyncio.sleep(0.01)
        held.go.set()
        await asked
        while len(held.began) < 6:
            await asyncio.sleep(0.01)

    with_texts(test)
    assert held.began == ["m0", "m5", "m1", "m2", "m3", "m4"]


def test_nothing_is_read_before_it_is_asked_for_where_there_is_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr(made, "SMALL_BYTES", 0)
    specs = [spec_of(write(tmp_path / name, make()), name) for name, make in KINDS]

    async def test(texts):
        texts.follow(specs)
        await texts._warming
        assert (texts.has(specs[0]), texts.has(specs[1])) == (True, False)
        assert (await texts.get(specs[1])).encode("hello")
        assert not texts.has(specs[0])  # which ended for it

    with_texts(test, most_bytes=1)


def test_one_that_does_not_fit_its_weights_is_refused(tmp_path):
    spec = spec_of(write(tmp_path / "m", byte_level(300)), vocab_tokens=299)

    async def test(texts):
        with pytest.raises(CheckpointError, match="of different models"):
            await texts.get(spec)

    with_texts(test)


def test_on_a_node_of_a_cluster_a_tokenizer_is_waited_for_until_it_has_come(tmp_path):
    spec = spec_of("m")  # by its name, as all nodes are told

    async def test(texts):
        texts.follow([spec])
        assert not texts.has(spec)
        with pytest.raises(ModelLoading, match="still on its way to this node"):
            await texts.get(spec)
        write(tmp_path / TEXTS / "m", byte_level(300))
        assert (await texts.get(spec)).encode("ab")
        assert texts.has(spec)

    with_texts(test, here=Here(tmp_path))


def lines_of(address, body):
    with (
        httpx.Client(base_url=address, timeout=30) as client,
        client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response,
    ):
        yield response.status_code
        yield from (line for line in response.iter_lines() if line)


BODY = {"model": "m", "prompt": "hello"}


def test_a_stream_has_headers_and_pings_while_its_tokenizer_is_read(tmp_path, held):
    with listening(Proxy(tmp_path)) as address, contextlib.closing(lines_of(address, BODY)) as got:
        assert (next(got), next(got)) == (200, ": ping")
        live = httpx.get(f"{address}/health/live", timeout=5)
        assert live.status_code == 200
        held.go.set()
        rest = list(got)
        assert rest[-1] == "data: [DONE]"
        frames = [json.loads(one.removeprefix("data: ")) for one in rest[:-1] if one[0] == "d"]
        assert "".join(one["choices"][0]["text"] for one in frames).startswith("The quick")


def test_a_tokenizer_that_does_not_come_ends_a_request_at_its_deadline(tmp_path, held):
    with listening(Proxy(tmp_path, request_timeout_s=1.0)) as address:
        status, *lines = lines_of(address, BODY)
        assert (status, lines[0], lines[-1]) == (200, ": ping", "data: [DONE]")
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "timeout"
        whole = httpx.post(f"{address}/v1/completions", json=BODY, timeout=10)
        assert (whole.status_code, whole.json()["error"]["code"]) == (504, "timeout")
        held.go.set()


def test_one_that_cannot_be_read_is_an_error_of_its_own_requests(tmp_path):
    proxy = Proxy(tmp_path)
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    with listening(proxy) as address:
        answer = httpx.post(f"{address}/v1/completions", json=BODY, timeout=10)
        assert answer.json()["error"]["code"] == "checkpoint_error"
        assert httpx.get(f"{address}/health/live", timeout=5).status_code == 200
