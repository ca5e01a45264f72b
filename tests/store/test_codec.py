"""Messages as bytes: the same back, and a clear error for anything else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegaeon.errors import RegionMismatch
from aegaeon.sampling import PromptScores, TokenLogProbs
from aegaeon.store.codec import decode_instance_message, decode_replies, encode, joined
from aegaeon.types import (
    Accepted,
    Cancel,
    Declined,
    DeviceKv,
    Drain,
    InstanceMessage,
    KvHandle,
    Moved,
    Reply,
    Request,
    RequestFailed,
    SamplingParams,
    Submit,
    TokenEvent,
    Transfer,
)

REQUEST = Request(
    id="r",
    model="m",
    prompt_token_ids=tuple(range(1000)),
    sampling=SamplingParams(temperature=0.7, seed=2**63 - 1, logit_bias=((5, -1.5),), logprobs=0),
    max_tokens=64,
    stop_token_ids=(1, 2),
    reply_to="proxy-1",
    arrival_s=1.5,
    deadline_s=9.25,
    generated_token_ids=(7,),
    attempt=2,
)


@pytest.mark.parametrize(
    "message",
    [
        Submit(REQUEST),
        Cancel("r"),
        Cancel("r", 3),
        Drain(),
        Transfer(REQUEST, KvHandle(owner=1 << 63, blocks=(1, 2), cached_tokens=9), "i.1", 2.5),
        Transfer(
            REQUEST,
            KvHandle(
                owner=1,
                blocks=(1,),
                cached_tokens=9,
                device=DeviceKv("cuda:0", 7, b"\x00\xff" * 32, 1 << 40, 4096, (0, 1 << 31)),
            ),
            "i.1",
            2.5,
        ),
        Accepted("r", 1, "i"),
        Declined("r", 1, "i", "overloaded", "full"),
    ],
)
def test_messages_to_instances_come_back_equal(message: InstanceMessage) -> None:
    assert decode_instance_message(encode(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        TokenEvent("r", 1, 3, (5, 6), "i", "stop"),
        TokenEvent("r", 0, 0, (5,), "i"),
        TokenEvent("r", 0, 0, (5,), "i", None, (TokenLogProbs(-0.5, ((5, -0.5), (6, -2.0))),)),
        PromptScores("r", 1, 32, (TokenLogProbs(-1.5), TokenLogProbs(-2.5, ((7, -0.1),)))),
        Moved("r", 1, "i", 1 << 40),
        RequestFailed("r", 1, "timeout", "too late — ü", "i"),
    ],
)
def test_replies_come_back_equal(message: Reply) -> None:
    assert decode_replies(encode(message)) == [message]


def test_joined_replies_come_back_in_order() -> None:
    replies = [TokenEvent(f"r{n}", 0, n, (n, 70_000), "i") for n in range(300)]
    assert decode_replies(joined([encode(reply) for reply in replies])) == replies
    assert decode_replies(joined([])) == []


def test_a_message_of_the_other_direction_is_refused() -> None:
    with pytest.raises(RegionMismatch, match="one version"):
        decode_replies(encode(Drain()))
    with pytest.raises(RegionMismatch, match="one version"):
        decode_replies(joined([encode(Drain())]))


@given(st.binary(max_size=200))
def test_other_bytes_are_refused_and_never_crash(record: bytes) -> None:
    for decode in (decode_instance_message, decode_replies):
        try:
            decode(record)
        except RegionMismatch:
            continue
