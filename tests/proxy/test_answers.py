"""Chunks that are put together from prepared parts are those that are encoded whole."""

import msgspec
import pytest

from aegaeon.proxy.answers import Answer, PromptDetails, Usage
from aegaeon.proxy.tools import Call
from aegaeon.proxy.transcript import Piece, TokenScore
from aegaeon.sampling import TokenLogProbs

TEXTS = ('"quoted"\\ \n', "größer 世界 \U0001f600", "\u2028\x00<b>", "the text of a chunk", "plain")


def usage_of(prompt, completion):
    return Usage(prompt, completion, prompt + completion, PromptDetails(prompt - 1))


def told(chunk):
    return msgspec.json.decode(chunk.removeprefix(b"data: "))


@pytest.mark.parametrize("kind", ["chat", "text"])
@pytest.mark.parametrize("with_usage", [False, True])
@pytest.mark.parametrize("usage", [None, usage_of(3, 4)])
def test_a_chunk_in_the_middle_is_what_a_whole_encoding_gives(kind, with_usage, usage):
    answer = Answer(kind, 'm"odel the text of a chunk', "cmpl-1", with_usage)
    for index in (0, 1):
        for instance in ("i", "j"):
            for text in TEXTS:
                piece = Piece(index, text, 1, None, instance)
                prepared = answer.piece(piece, usage)
                assert prepared == answer._piece(piece, usage)
                chunk = told(prepared)
                (choice,) = chunk["choices"]
                said = choice["delta"]["content"] if kind == "chat" else choice["text"]
                assert (said, choice["index"]) == (text, index)
                assert chunk["aegaeon"] == {"instance": instance}


def test_a_running_usage_moves_on():
    answer = Answer("text", "m", "cmpl-1", True)
    for made in range(1, 4):
        chunk = told(answer.piece(Piece(0, "a", 1, None, "i"), usage_of(2, made)))
        assert chunk["usage"] == {
            "prompt_tokens": 2,
            "completion_tokens": made,
            "total_tokens": 2 + made,
            "prompt_tokens_details": {"cached_tokens": 1},
        }


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_what_only_some_chunks_have_is_in_theirs_alone(kind):
    answer = Answer(kind, "m", "cmpl-1", bytes_of=lambda token_id: bytes([token_id]))
    plain = Piece(0, "a", 1, None, "i")
    scored = msgspec.structs.replace(
        plain, scores=(TokenScore(97, 0, TokenLogProbs(-0.5, ((97, -0.5),))),)
    )
    last = msgspec.structs.replace(plain, finish_reason="length", cached_tokens=3)
    before, with_scores, with_figures, after = (
        told(answer.piece(piece)) for piece in (plain, scored, last, plain)
    )
    assert before == after
    assert before["choices"][0]["logprobs"] is None
    assert "-0.5" in str(with_scores["choices"][0]["logprobs"])
    assert with_figures["choices"][0]["finish_reason"] == "length"
    assert with_figures["aegaeon"]["cached_tokens"] == 3


def test_a_call_beside_text_is_told():
    answer = Answer("chat", "m", "chatcmpl-1")
    assert b"tool_calls" not in answer.piece(Piece(0, "a", 1, None, "i"))
    call = Call(index=0, id="call-1", name="look", arguments="{}")
    chunk = told(answer.piece(Piece(0, "a", 1, None, "i", calls=(call,))))
    assert chunk["choices"][0]["delta"]["tool_calls"][0]["function"]["name"] == "look"
