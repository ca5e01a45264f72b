"""What `curl -N` and the openai client see, streaming and not, and how bad requests end."""

import httpx
import openai
import pytest

from tests.support.server import Server, stream_chunks
from tests.support.smollm2 import smollm2_directory

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def server(checkpoints, tmp_path_factory):
    directory = tmp_path_factory.mktemp("server")
    with Server(
        directory, checkpoints, "--colocated-count", "2", "--max-body-bytes", "100000"
    ) as it:
        yield it


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(server, path="chat/completions", **request):
    return httpx.post(f"{server.url}/v1/{path}", timeout=30, **request)


def test_the_openai_client_streams_what_it_gets_whole(client):
    asked = {"model": "ada", "messages": MESSAGES, "max_tokens": 30, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    # The second time, all of the prompt that can be is found.
    usage, first = chunks[-1].usage, whole.usage
    assert first.prompt_tokens_details.cached_tokens == 0
    assert usage.prompt_tokens_details.cached_tokens > 0
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [getattr(usage, name) for name in counts] == [getattr(first, name) for name in counts]
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == (
        whole.choices[0].finish_reason
    )


def test_completions_stream_what_they_answer_whole(client):
    asked = {"model": "cleo", "prompt": "the device", "max_tokens": 30, "temperature": 0}
    whole = client.completions.create(**asked)
    with client.completions.create(**asked, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    assert whole.usage.completion_tokens <= 30


def test_a_seed_makes_sampling_repeatable(client):
    def ask(seed):
        answer = client.completions.create(
            model="bob", prompt="the", max_tokens=20, temperature=1.0, seed=seed
        )
        return answer.choices[0].text

    assert ask(1) == ask(1) != ask(2)


def test_a_raw_stream_is_frames_of_one_line_and_ends_with_done(server):
    body = {"model": "bob", "messages": MESSAGES, "max_tokens": 10, "stream": True}
    chunks = list(stream_chunks(f"{server.url}/v1/chat/completions", body))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert [c["choices"][0]["finish_reason"] for c in chunks].count(None) == len(chunks) - 1


def test_models_and_health_say_what_is_served_and_load_nothing(server, client):
    assert [model.id for model in client.models.list()] == ["ada", "bob", "cleo"]
    health = httpx.get(f"{server.url}/health", timeout=10)
    assert health.status_code == 200
    assert {one["id"] for one in health.json()["instances"]} == {"instance-0", "instance-1"}


def test_a_real_checkpoint_answers_in_words(tmp_path):
    with (
        Server(tmp_path, {"smol": smollm2_directory()}) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client,
    ):
        answer = client.chat.completions.create(
            model="smol", messages=MESSAGES, max_tokens=24, temperature=0
        )
    assert "Paris" in answer.choices[0].message.content


@pytest.mark.parametrize(
    ("request_body", "status", "code", "hint"),
    [
        ({"content": b"{not json"}, 400, None, "JSON"),
        ({"json": {"model": "nobody", "messages": MESSAGES}}, 404, "model_not_found", "nobody"),
        ({"json": {"messages": MESSAGES}}, 400, None, "model"),
        ({"json": {"model": "ada", "messages": []}}, 400, None, "messages"),
        (
            {"json": {"model": "ada", "messages": [{"role": "user", "content": "long " * 4500}]}},
            *(400, "context_length_exceeded", "4096"),
        ),
        (
            {"json": {"model": "ada", "messages": MESSAGES, "max_tokens": 4096}},
            *(400, "context_length_exceeded", "4096"),
        ),
        ({"content": b"[" * 200_000}, 413, None, "100000"),
        ({"json": {"model": "../../etc", "messages": MESSAGES}}, 404, "model_not_found", ""),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_bad_request_is_an_error_of_one_line_before_any_headers(
    server, request_body, status, code, hint, is_stream
):
    if "json" in request_body:
        request_body = {"json": {**request_body["json"], "stream": is_stream}}
    headers = {"content-type": "application/json"}
    answer = post(server, headers=headers, **request_body)
    error = answer.json()["error"]
    assert (answer.status_code, set(error)) == (status, {"message", "type", "param", "code"})
    assert hint in error["message"] and "\n" not in error["message"]
    assert code is None or error["code"] == code
    assert answer.headers["x-request-id"]


def test_a_wrong_path_and_a_wrong_method_have_the_shape_of_errors(server):
    for answer, status in (
        (httpx.get(f"{server.url}/v2/none", timeout=10), 404),
        (httpx.get(f"{server.url}/v1/completions", timeout=10), 405),
    ):
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_after_all_that_the_server_still_serves(server, client):
    answer = client.completions.create(model="ada", prompt="the", max_tokens=3)
    assert answer.usage.completion_tokens <= 3
