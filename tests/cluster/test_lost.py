"""When a controller holds an instance to be lost."""

import pytest

from aegaeon.cluster.controller import is_lost
from aegaeon.types import Instance, InstanceRecord, InstanceStatus


def make_row(node: str, lease_left_s: float) -> Instance:
    record = InstanceRecord(
        id="i", incarnation=1, role="colocated", device="null", mailbox="i.1", pid=1, models=(),
        node=node,
    )  # fmt: skip
    return Instance(record, InstanceStatus(), lease_left_s)


@pytest.mark.parametrize(
    ("node", "lease_left_s", "silent", "expected"),
    [
        ("here", 9.0, {"i"}, False),  # cut off from us, but not from the store
        ("here", 6.6, {"i"}, False),  # a little late
        ("here", 6.4, {"i"}, True),
        ("here", 0.1, set(), False),  # its supervisor lives, and sees to it
        ("gone", 9.9, set(), True),
    ],
)
def test_an_instance_is_lost_with_its_node_or_silent_to_all(node, lease_left_s, silent, expected):
    assert is_lost(make_row(node, lease_left_s), {"here"}, silent, 10.0) is expected
