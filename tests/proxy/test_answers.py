"""Chunks that are put together from prepared parts are those that are encoded whole."""

import msgspec
import pytest

from aegaeon.proxy.answers import Answer, Usage

TEXTS = ('"quoted"\\ \n', "größer 世界 \U0001f600", "\u2028\x00<b>", "the text of a chunk", "plain")


@pytest.mark.parametrize("kind", ["chat", "text"])
@pytest.mark.parametrize("with_usage", [False, True])
@pytest.mark.parametrize("usage", [None, Usage(3, 4, 7)])
def test_a_chunk_in_the_middle_is_what_a_whole_encoding_gives(kind, with_usage, usage):
    answer = Answer(kind, 'm"odel the text of a chunk', "cmpl-1", with_usage)
    for index in (0, 1):
        for instance in ("i", "j"):
            for text in TEXTS:
                prepared = answer.piece(index, text, None, instance, usage)
                assert prepared == answer._piece(index, text, None, instance, usage)
                chunk = msgspec.json.decode(prepared.removeprefix(b"data: "))
                (choice,) = chunk["choices"]
                said = choice["delta"]["content"] if kind == "chat" else choice["text"]
                assert (said, choice["index"]) == (text, index)
                assert chunk["aegaeon"] == {"instance": instance}


def test_a_running_usage_moves_on():
    answer = Answer("text", "m", "cmpl-1", True)
    for made in range(1, 4):
        chunk = answer.piece(0, "a", None, "i", Usage(2, made, 2 + made))
        told = msgspec.json.decode(chunk.removeprefix(b"data: "))["usage"]
        assert told == {"prompt_tokens": 2, "completion_tokens": made, "total_tokens": 2 + made}
