"""Which instance a request is sent to, as far as the room that each has for those that wait."""

from collections import Counter

import pytest

from aegaeon.config import Settings
from aegaeon.proxy.outbox import Outbox
from aegaeon.store.local import LocalDomain
from tests.support.fake_instance import FakeInstance
from tests.support.specs import make_request

MOST = 4


@pytest.fixture
def domain():
    return LocalDomain()


@pytest.fixture
def outbox(domain):
    sending = Outbox(domain, Settings(colocated_count=2, max_waiting=MOST))
    yield sending
    sending.close()


@pytest.fixture
def instances(domain):
    found = [FakeInstance(domain, lambda _: (1,), id=f"instance-{number}") for number in range(2)]
    for instance in found:
        instance.hold_after = 0
    yield found
    for instance in found:
        instance.die()


def sent(outbox, count, first=0):
    """Submit so many requests of one model; return how many came to each instance."""
    targets = [
        outbox.submit(make_request(f"r{first + number}", "m"), frozenset())
        for number in range(count)
    ]
    return Counter(target.instance for target in targets)


def test_a_model_leaves_its_home_before_more_wait_there_than_may(outbox, instances):
    assert sorted(sent(outbox, MOST).values()) == [MOST]  # it has a home
    # As many as the door lets in for two: each has room of its own.
    assert sum(sent(outbox, MOST, MOST).values()) == MOST
    assert Counter(target.instance for target, _ in outbox._sent.elements()) == {
        "instance-0": MOST,
        "instance-1": MOST,
    }


def test_those_that_run_take_no_room_of_those_that_wait(outbox, instances, monkeypatch):
    monkeypatch.setattr("aegaeon.proxy.outbox.SNAPSHOT_AGE_S", 0.0)
    instances[0].publish(running={"m": 3 * MOST}, waiting={"m": MOST - 1})
    instances[1].publish(load=99.0)
    assert sent(outbox, 1) == {"instance-0": 1}
    instances[0].publish(running={"m": 3 * MOST}, waiting={"m": MOST})
    assert sent(outbox, 1, 1) == {"instance-1": 1}


def test_where_nobody_has_room_it_is_sent_as_ever(outbox, instances):
    for instance in instances:
        instance.publish(waiting={"m": MOST})
    assert sum(sent(outbox, 3).values()) == 3


@pytest.fixture
def nodes(domain):
    found = [
        FakeInstance(domain, lambda _: (1,), id=f"instance-{node}", node=node) for node in "ab"
    ]
    for instance in found:
        instance.hold_after = 0
    yield found
    for instance in found:
        instance.die()


def test_among_nodes_those_get_requests_where_the_model_lives(outbox, nodes, monkeypatch):
    monkeypatch.setattr("aegaeon.proxy.outbox.SNAPSHOT_AGE_S", 0.0)
    first, second = nodes
    first.publish(resident=("m",))
    assert sent(outbox, 2) == {"instance-a": 2}
    second.serve("m", "other")
    first.serve("other")
    assert sent(outbox, 2, 2) == {"instance-b": 2}
    second.serve("other")
    assert outbox.submit(make_request("r9", "m"), frozenset()) is None
    first.serve("m")
    assert sent(outbox, 1, 10) == {"instance-a": 1}
