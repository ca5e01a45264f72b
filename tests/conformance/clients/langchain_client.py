"""langchain-openai: what its chat model adds to the plain client."""

import asyncio
import json

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAI
from probe import (
    BASE_URL,
    KEY,
    MODEL,
    PERSON,
    TOOL_MODEL,
    WEATHER,
    feature,
    is_person,
    main,
)

ASKED = [HumanMessage("What is the capital of France?")]


def model(name: str = MODEL, **fields: object) -> ChatOpenAI:
    """Return a chat model of the server."""
    return ChatOpenAI(
        model=name, base_url=f"{BASE_URL}/v1", api_key=KEY, max_retries=0, timeout=120, **fields
    )


@feature("chat")
def _chat() -> None:
    answer = model(temperature=0, max_tokens=24).invoke(ASKED)
    assert "Paris" in answer.content
    assert answer.usage_metadata and answer.usage_metadata["output_tokens"] > 4


@feature("chat, streamed")
def _streamed() -> None:
    chunks = list(model(temperature=0, max_tokens=24).stream(ASKED))
    assert "Paris" in "".join(str(chunk.content) for chunk in chunks)


@feature("usage of a stream")
def _usage() -> None:
    chunks = list(model(max_tokens=4, stream_usage=True).stream(ASKED))
    assert sum((c.usage_metadata or {}).get("output_tokens", 0) for c in chunks) == 4


@feature("text completion, streamed too")
def _completion() -> None:
    text = OpenAI(model=MODEL, base_url=f"{BASE_URL}/v1", api_key=KEY, max_tokens=8, temperature=0)
    assert text.invoke("Once upon a time") == "".join(text.stream("Once upon a time"))


@feature("several prompts, of text or token ids")
def _batch() -> None:
    answers = model(max_tokens=4).batch([ASKED, ASKED, ASKED])
    assert len(answers) == 3


@feature("logprobs, of chat")
def _logprobs() -> None:
    answer = model(max_tokens=3, logprobs=True, top_logprobs=2).invoke(ASKED)
    assert len(answer.response_metadata["logprobs"]["content"]) == 3


@feature("a required tool call")
def _tool() -> None:
    bound = model(TOOL_MODEL, max_tokens=200).bind_tools([WEATHER], tool_choice="required")
    answer = bound.invoke(ASKED)
    assert answer.tool_calls[0]["name"] == "get_weather"
    assert set(answer.tool_calls[0]["args"]) == {"city", "unit"}


@feature("a named tool call, streamed")
def _streamed_tool() -> None:
    bound = model(TOOL_MODEL, max_tokens=200).bind_tools([WEATHER], tool_choice="get_weather")
    whole = None
    for chunk in bound.stream(ASKED):
        whole = chunk if whole is None else whole + chunk
    assert whole and whole.tool_calls[0]["name"] == "get_weather"


@feature("JSON of a schema")
def _schema() -> None:
    schema = {"title": "person", "description": "A person.", **PERSON}
    shaped = model(max_tokens=200).with_structured_output(schema, method="json_schema")
    is_person(json.dumps(shaped.invoke(ASKED)))


@feature("asynchronous, ended early")
def _early() -> None:
    async def leave() -> int:
        count = 0
        async for _ in model(max_tokens=400).astream(ASKED):
            count += 1
            if count == 3:
                break
        return count

    assert asyncio.run(leave()) == 3


if __name__ == "__main__":
    main()
