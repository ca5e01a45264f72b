"""openai-python: every field of ours that it has a name for."""

import asyncio
import json

import openai
from probe import (
    BASE_URL,
    KEY,
    MODEL,
    PERSON,
    QUESTION,
    TOOL_MODEL,
    WEATHER,
    feature,
    is_person,
    is_weather,
    main,
    refused,
)

client = openai.OpenAI(base_url=f"{BASE_URL}/v1", api_key=KEY, max_retries=0, timeout=120)
chat = client.chat.completions
FORMAT = {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON, "strict": True}}


@feature("list models, one model")
def _models() -> None:
    assert {MODEL, TOOL_MODEL} <= {model.id for model in client.models.list()}
    assert client.models.retrieve(MODEL).id == MODEL


@feature("chat")
def _chat() -> None:
    answer = chat.create(model=MODEL, messages=QUESTION, max_tokens=24, temperature=0)
    assert "Paris" in (answer.choices[0].message.content or "")
    usage = answer.usage
    assert usage and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@feature("chat, streamed")
def _streamed() -> None:
    whole = chat.create(model=MODEL, messages=QUESTION, max_tokens=24, temperature=0)
    chunks = list(
        chat.create(model=MODEL, messages=QUESTION, max_tokens=24, temperature=0, stream=True)
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["stop"]


@feature("usage of a stream")
def _stream_usage() -> None:
    options: openai.types.chat.ChatCompletionStreamOptionsParam = {"include_usage": True}
    chunks = list(
        chat.create(
            model=MODEL, messages=QUESTION, max_tokens=4, stream=True, stream_options=options
        )
    )
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens == 4 and not chunks[-1].choices


@feature("text completion, streamed too")
def _completion() -> None:
    asked = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**asked).choices[0].text
    parts = [c.choices[0].text for c in client.completions.create(**asked, stream=True)]
    assert whole and "".join(parts) == whole


@feature("several prompts, of text or token ids")
def _prompts() -> None:
    prompts = ["One, two,", "Red, green,"]
    answer = client.completions.create(model=MODEL, prompt=prompts, max_tokens=4)
    assert [choice.index for choice in answer.choices] == [0, 1]
    ids = client.completions.create(model=MODEL, prompt=[[1, 2, 3], [4, 5]], max_tokens=4)
    assert len(ids.choices) == 2 and ids.usage and ids.usage.prompt_tokens == 5


@feature("stop")
def _stop() -> None:
    answer = chat.create(model=MODEL, messages=QUESTION, max_tokens=24, temperature=0, stop="Paris")
    assert "Paris" not in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"


@feature("n")
def _several() -> None:
    answer = chat.create(model=MODEL, messages=QUESTION, max_tokens=6, n=3, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]


@feature("seed")
def _seed() -> None:
    told = [
        chat.create(model=MODEL, messages=QUESTION, max_tokens=16, seed=7, temperature=1.5)
        for _ in range(2)
    ]
    assert told[0].choices[0].message.content == told[1].choices[0].message.content


@feature("penalties")
def _penalties() -> None:
    again = [{"role": "user", "content": "Write the word hello twenty times."}]
    asked = {"model": MODEL, "messages": again, "max_tokens": 60, "temperature": 0}
    plain = chat.create(**asked).choices[0].message.content
    asked |= {"frequency_penalty": 2, "presence_penalty": 2}
    assert chat.create(**asked).choices[0].message.content != plain


@feature("logit_bias")
def _bias() -> None:
    answer = chat.create(
        model=MODEL, messages=QUESTION, max_tokens=5, temperature=0, logit_bias={"100": 100}
    )
    content = answer.choices[0].message.content or ""
    assert len(content) % 5 == 0
    assert content[: len(content) // 5] * 5 == content


@feature("logprobs, of chat")
def _chat_logprobs() -> None:
    answer = chat.create(
        model=MODEL, messages=QUESTION, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    told = answer.choices[0].logprobs
    assert told and told.content and len(told.content) == 5
    for token in told.content:
        assert len(token.top_logprobs) == 3 and token.top_logprobs[0].logprob <= 0
        assert token.token == token.top_logprobs[0].token, "greedy takes the likeliest"


@feature("logprobs and echo, of completions")
def _logprobs() -> None:
    answer = client.completions.create(
        model=MODEL, prompt="Paris is in France", max_tokens=1, echo=True, logprobs=1
    )
    told = answer.choices[0].logprobs
    assert told and told.tokens and told.token_logprobs and told.text_offset
    assert "".join(told.tokens) == answer.choices[0].text
    assert told.token_logprobs[0] is None and all(p <= 0 for p in told.token_logprobs[1:])


@feature("a required tool call")
def _tool() -> None:
    answer = chat.create(
        model=TOOL_MODEL, messages=QUESTION, tools=[WEATHER], tool_choice="required", max_tokens=200
    )
    (call,) = (answer.choices[0].message.tool_calls or [])[:1]
    assert call.function.name == "get_weather"
    is_weather(call.function.arguments)
    assert answer.choices[0].finish_reason == "tool_calls"


@feature("a named tool call, streamed")
def _streamed_tool() -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    chunks = chat.create(
        model=TOOL_MODEL,
        messages=QUESTION,
        tools=[WEATHER],
        tool_choice=named,
        max_tokens=200,
        stream=True,
    )
    name, arguments = "", ""
    for chunk in chunks:
        for call in chunk.choices[0].delta.tool_calls or []:
            assert call.function
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    assert name == "get_weather"
    is_weather(arguments)


@feature("tools in the conversation")
def _tool_history() -> None:
    call = {"name": "get_weather", "arguments": '{"city": "Rome", "unit": "celsius"}'}
    messages = [
        *QUESTION,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "21 degrees"},
    ]
    answer = chat.create(model=TOOL_MODEL, messages=messages, tools=[WEATHER], max_tokens=4)
    assert answer.choices[0].finish_reason in {"length", "stop", "tool_calls"}


@feature("JSON")
def _json() -> None:
    kind = {"type": "json_object"}
    asked = "Answer with a JSON object that has your name."
    answer = chat.create(
        model=MODEL,
        messages=[{"role": "user", "content": asked}],
        response_format=kind,
        max_tokens=120,
        temperature=0,
        seed=1,
    )
    content = answer.choices[0].message.content or ""
    assert content.lstrip().startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(content), dict)


@feature("JSON of a schema")
def _schema() -> None:
    answer = chat.create(model=MODEL, messages=QUESTION, response_format=FORMAT, max_tokens=200)
    assert answer.choices[0].finish_reason == "stop"
    is_person(answer.choices[0].message.content or "")


@feature("errors as the client's classes")
def _errors() -> None:
    def ask(**fields: object) -> object:
        return chat.create(**{"model": MODEL, "messages": QUESTION, **fields})

    refused(lambda: ask(model="none"), openai.NotFoundError, "model_not_found")
    refused(lambda: ask(temperature=3), openai.BadRequestError, "invalid_value")
    refused(lambda: ask(max_tokens=10**8), openai.BadRequestError, "context_length_exceeded")


@feature("a wrong key")
def _key() -> None:
    other = openai.OpenAI(base_url=f"{BASE_URL}/v1", api_key="wrong", max_retries=0)
    refused(other.models.list, openai.AuthenticationError, "invalid_api_key")


@feature("asynchronous, ended early")
def _early() -> None:
    async def leave() -> int:
        async with openai.AsyncOpenAI(base_url=f"{BASE_URL}/v1", api_key=KEY) as other:
            stream = await other.chat.completions.create(
                model=MODEL, messages=QUESTION, max_tokens=400, stream=True
            )
            count = 0
            async for _ in stream:
                count += 1
                if count == 3:
                    break
            await stream.close()
            return count

    assert asyncio.run(leave()) == 3


if __name__ == "__main__":
    main()
