"""Whether KV goes to another node or is prefilled there again, and who is nearest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegaeon.measures import Speed
from aegaeon.scheduler.moving import LEAST_BYTES, SETUP_S, Links, is_worth_moving, nearest
from aegaeon.types import Instance, InstanceRecord, InstanceStatus

MB = 1_000_000
SPEED = Speed(token_s=1e-3, load_s=1.0)


@pytest.mark.parametrize(
    ("kv_bytes", "tokens", "byte_s", "speed", "expected"),
    [
        (100 * MB, 1000, 1e-9, SPEED, True),  # 0.1 s against 1 s
        (100 * MB, 1000, 1e-7, SPEED, False),  # 10 s against 1 s
        (100 * MB, 1000, None, SPEED, True),  # nobody has measured the link
        (100 * MB, 1000, 1e-7, None, True),  # nor the model there
        (0, 1, 1e-9, SPEED, False),  # one token is there before a connection is
    ],
)
def test_what_is_sooner_is_done(kv_bytes, tokens, byte_s, speed, expected):
    assert is_worth_moving(kv_bytes, tokens, byte_s, speed) is expected


@given(st.integers(1, 1 << 40), st.integers(1, 1 << 20), st.floats(1e-12, 1e-5))
def test_it_is_the_quicker_of_both_that_is_chosen(kv_bytes, tokens, byte_s):
    is_moved = is_worth_moving(kv_bytes, tokens, byte_s, SPEED)
    moving_s, prefill_s = SETUP_S + kv_bytes * byte_s, tokens * SPEED.token_s
    assert is_moved == (moving_s < prefill_s)


def test_a_link_is_learnt_and_little_says_nothing():
    links = Links()
    links.note(LEAST_BYTES - 1, 1.0)
    links.note(LEAST_BYTES, 0.0)
    assert links.byte_s is None
    links.note(100 * MB, 0.1)
    assert links.byte_s == pytest.approx(1e-9)
    for _ in range(40):
        links.note(100 * MB, 1.0)
    assert links.byte_s == pytest.approx(1e-8, rel=0.01)


def make_row(id, node):
    record = InstanceRecord(
        id=id, incarnation=1, role="decode", device="null", mailbox=id, pid=1, models=(), node=node
    )
    return Instance(record, InstanceStatus())


def test_those_that_share_the_memory_come_first():
    rows = tuple(make_row(id, node) for id, node in [("a", "n"), ("b", "m"), ("c", "n")])
    near, far = nearest(rows, "m")
    assert [row.record.id for row in near] == ["b"]
    assert [row.record.id for row in far] == ["a", "c"]
