"""JSON and tool calls of models whose weights are random: only the grammar can make them right."""

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.support.chat_templates import HEADERS, MARKS
from tests.support.checkpoints import make_checkpoint
from tests.support.server import Server

MESSAGES = [{"role": "user", "content": "What is the weather?"}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["a", "b"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "look_up", "parameters": PERSON}},
    {"type": "function", "function": {"name": "now"}},
]
AS_PERSON = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}


def with_template(directory, family, template):
    path = make_checkpoint(directory, family, max_position_embeddings=4096)
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    return path


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    models = {
        "tagged": with_template(root / "tagged", "qwen3", MARKS),
        "bare": with_template(root / "bare", "llama", HEADERS),
    }
    with (
        Server(tmp_path_factory.mktemp("server"), models, "--colocated-count", "2") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def ask(client, model, **fields):
    return client.chat.completions.create(
        **{"model": model, "messages": MESSAGES, "max_tokens": 400, "seed": 5, **fields}
    )


def is_person(value):
    return set(value) == {"name", "age", "kind"} and 0 <= value["age"] <= 99


@pytest.mark.parametrize("model", ["tagged", "bare"])
def test_answers_follow_the_schema_whole_and_streamed(client, model):
    whole = ask(client, model, response_format=AS_PERSON).choices[0]
    assert whole.finish_reason == "stop"
    assert is_person(json.loads(whole.message.content))
    with ask(client, model, response_format=AS_PERSON, stream=True) as chunks:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.message.content


def test_constrained_and_free_answers_come_side_by_side(client):
    alone = ask(client, "tagged", response_format=AS_PERSON).choices[0].message.content
    free = ask(client, "tagged", max_tokens=60).choices[0].message.content
    with (
        ask(client, "tagged", response_format=AS_PERSON, stream=True) as held,
        ask(client, "tagged", max_tokens=60, stream=True) as others,
    ):
        texts = [
            "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            for chunks in (held, others)
        ]
    assert texts == [alone, free]


@pytest.mark.parametrize("model", ["tagged", "bare"])
def test_a_call_that_must_come_does(client, model):
    named = {"type": "function", "function": {"name": "look_up"}}
    choice = ask(client, model, tools=TOOLS, tool_choice=named).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.function.name == "look_up" and is_person(json.loads(call.function.arguments))


@pytest.mark.parametrize("model", ["tagged", "bare"])
def test_some_call_comes_where_one_is_required(client, model):
    choice = ask(
        client, model, tools=TOOLS, tool_choice="required", parallel_tool_calls=False
    ).choices[0]
    (call,) = choice.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert is_person(arguments) if call.function.name == "look_up" else arguments == {}


def test_a_streamed_call_is_the_same(client):
    named = {"type": "function", "function": {"name": "look_up"}}
    whole = ask(client, "tagged", tools=TOOLS, tool_choice=named).choices[0].message.tool_calls[0]
    with ask(client, "tagged", tools=TOOLS, tool_choice=named, stream=True) as chunks:
        calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert "".join(call.function.arguments for call in calls) == whole.function.arguments
    assert [call.index for call in calls] == [0]


@pytest.mark.parametrize("model", ["tagged", "bare"])
def test_a_call_that_is_cut_is_a_beginning_of_the_whole_one(client, model):
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": tools}}
    whole = ask(client, model, tools=TOOLS, tool_choice=allowed).choices[0].message.tool_calls[0]
    cut = ask(client, model, tools=TOOLS, tool_choice=allowed, max_tokens=60).choices[0]
    (call,) = cut.message.tool_calls
    assert (cut.finish_reason, cut.message.content) == ("length", None)
    assert call.function.name == "look_up" == whole.function.name
    assert whole.function.arguments.startswith(call.function.arguments)
    assert 0 < len(call.function.arguments) < len(whole.function.arguments)


def test_a_grammar_that_becomes_too_much_ends_in_an_error(client):
    pattern = "^(([a-z]{1,100}){1,100}){1,100}$"
    asked = {"name": "n", "schema": {"type": "string", "pattern": pattern}}
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, "tagged", response_format={"type": "json_schema", "json_schema": asked})
    assert caught.value.status_code == 400


@pytest.mark.thorough
def test_schemas_of_much_work_are_refused_beside_answers_that_go_on(client):
    def heavy(number):
        asked = {"name": "n", "schema": {"type": "integer", "multipleOf": 1_000_003 + 2 * number}}
        # Where checks wait for long, on a busy machine, clients are told to come again.
        patient = client.with_options(max_retries=5)
        with pytest.raises(openai.BadRequestError, match="too much"):
            ask(patient, "tagged", response_format={"type": "json_schema", "json_schema": asked})

    alone = ask(client, "tagged", response_format=AS_PERSON).choices[0].message.content
    with ThreadPoolExecutor(2) as pool:
        refusals = [pool.submit(heavy, number) for number in range(2)]
        beside = ask(client, "tagged", response_format=AS_PERSON).choices[0].message.content
        assert beside == alone
        for refusal in refusals:
            refusal.result(60)


NUMBERS = {"type": "array", "items": {"type": "integer"}, "minItems": 60, "maxItems": 60}
AS_NUMBERS = {"type": "json_schema", "json_schema": {"name": "numbers", "schema": NUMBERS}}
SPLIT = ("--colocated-count", "0", "--prefill-count", "1", "--decode-count", "1")


@pytest.mark.parametrize("roles", [SPLIT, ("--colocated-count", "2")])
@pytest.mark.thorough
def test_a_constrained_stream_survives_its_instance_with_the_same_tokens(tmp_path, roles):
    models = {"m": with_template(tmp_path / "m", "qwen3", MARKS)}
    asked = {"response_format": AS_NUMBERS, "max_tokens": 2000, "frequency_penalty": 0.5}
    with (
        Server(tmp_path, models, *roles) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        whole = ask(client, "m", **asked).choices[0].message.content
        assert len(json.loads(whole)) == 60
        text, killed = "", None
        with ask(client, "m", **asked, stream=True) as chunks:
            for chunk in chunks:
                text += chunk.choices[0].delta.content or ""
                if killed is None and len(text) > 40:
                    killed = chunk.model_extra["aegaeon"]["instance"]
                    os.kill(server.instance_pids()[killed], signal.SIGKILL)
        assert killed is not None and text == whole
