"""A model on its way to a device: stage by stage, and whatever may keep it from coming."""

import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from aegaeon.errors import CheckpointError, LoadCancelled, WeightsEvicted
from aegaeon.memory.arena import Arena
from aegaeon.memory.arrival import NEEDED_LATER, NEEDED_NOW, Arrival
from aegaeon.memory.traffic import Traffic
from tests.support.held_copier import HeldCopier
from tests.support.polling import eventually

ENDS = (100, 300, 600, 1000)


class Host:
    """A model in the cache whose stages come when a test says so."""

    model = "a"

    def __init__(self):
        self.plan = SimpleNamespace(stages=len(ENDS), stage_ends=ENDS)
        self._arena = Arena(4096)
        self._arena.view[: ENDS[-1]] = bytes(k % 251 for k in range(ENDS[-1]))
        self.memory = SimpleNamespace(address=self._arena.address)
        self.stages_done = 0
        self.failure = None
        self.is_pinned = False
        self.is_evicted = False
        self.is_closed = False
        self._changed = threading.Condition()

    def content(self):
        return bytes(self._arena.view[: ENDS[-1]])

    def have(self, stages):
        with self._changed:
            self.stages_done = stages
            self._changed.notify_all()

    def fail(self, failure):
        with self._changed:
            self.failure = failure
            self._changed.notify_all()

    def interrupt(self):
        self.fail(LoadCancelled("not wanted any more"))

    def await_stage(self, stage):
        with self._changed:
            assert self._changed.wait_for(lambda: self.stages_done > stage or self.failure, 60)
            if self.stages_done <= stage:
                raise self.failure

    @contextmanager
    def pinned(self):
        if self.is_evicted:
            raise WeightsEvicted("gone")
        self.is_pinned = True
        try:
            yield
        finally:
            self.is_pinned = False

    def close(self):
        assert not self.is_pinned
        self.is_closed = True


class Way:
    """A host model, a copier that is held and a device."""

    def __init__(self):
        self.host, self.copier, self.arena = Host(), HeldCopier(), Arena(4096)
        self.arrival = None

    def begin(self):
        self.arrival = Arrival(self.host, self.arena.address, self.copier, Traffic(), Host.close)
        return self.arrival

    def await_tickets(self, count):
        eventually(lambda: len(self.copier.tickets) >= count)
        return self.copier.tickets


@pytest.fixture
def way():
    way = Way()
    yield way
    if way.arrival is not None:
        way.arrival.close()


def test_stages_are_copied_as_they_come_and_the_host_is_let_go_at_the_end(way):
    arrival = way.begin()
    way.host.have(1)
    assert [t.total_bytes for t in way.await_tickets(1)] == [100]
    way.host.have(3)
    assert [t.total_bytes for t in way.await_tickets(2)] == [100, 500]
    way.host.have(4)
    way.await_tickets(3)
    assert way.host.is_pinned and not arrival.is_complete
    way.copier.let_in()
    eventually(lambda: way.host.is_closed)
    assert arrival.is_complete and not arrival.is_lost
    assert bytes(way.arena.view[: ENDS[-1]]) == way.host.content()


def test_a_stage_is_there_though_the_copy_it_is_part_of_goes_on(way):
    way.host.have(4)
    arrival = way.begin()
    way.await_tickets(1)
    way.copier.let_in(300)
    arrival.await_stage(0)
    arrival.await_stage(1)
    waiter = threading.Thread(target=lambda: arrival.await_stage(2))
    waiter.start()
    way.copier.let_in(299)
    assert waiter.is_alive()
    way.copier.let_in(1)
    waiter.join(30)
    assert not waiter.is_alive() and not arrival.is_complete


def test_to_ask_whether_a_stage_is_in_waits_for_nothing(way):
    arrival = way.begin()
    assert not arrival.is_in(0)
    way.host.have(4)
    way.await_tickets(1)
    way.copier.let_in(299)
    assert arrival.is_in(0) and not arrival.is_in(1)
    way.copier.let_in()
    eventually(lambda: arrival.is_complete)
    assert arrival.is_in(3)


def test_what_a_step_waits_for_goes_first_also_what_comes_later(way):
    arrival = way.begin()
    way.host.have(1)
    way.await_tickets(1)
    arrival.hurry()
    way.host.have(2)
    assert [t.priority for t in way.await_tickets(2)] == [NEEDED_NOW, NEEDED_NOW]
    assert NEEDED_NOW < NEEDED_LATER


def test_close_while_it_comes_leaves_the_device_alone(way):
    arrival = way.begin()
    way.host.have(2)
    way.await_tickets(1)
    way.copier.let_in(50)
    arrival.close()
    arrival.close()
    before = bytes(way.arena.view)
    way.host.have(4)
    way.copier.let_in()
    assert bytes(way.arena.view) == before and len(way.copier.tickets) == 1
    assert way.host.is_closed and arrival.is_lost and not arrival.is_complete


@pytest.mark.parametrize("failure", [CheckpointError("cut off"), WeightsEvicted("gone")])
def test_what_fails_on_the_host_is_told_to_who_waits(way, failure):
    arrival = way.begin()
    way.host.have(2)
    way.await_tickets(1)
    way.copier.let_in()
    way.host.fail(failure)
    arrival.await_stage(1)
    with pytest.raises(type(failure), match=str(failure)):
        arrival.await_stage(2)
    assert arrival.is_lost


def test_a_model_evicted_before_its_copy_began_is_lost(way):
    way.host.is_evicted = True
    arrival = way.begin()
    with pytest.raises(WeightsEvicted, match="gone"):
        arrival.await_stage(0)
    eventually(lambda: way.host.is_closed)
    assert arrival.is_lost


def test_a_copy_that_fails_is_a_loss_of_the_weights_and_no_broken_checkpoint(way):
    way.host.have(4)
    arrival = way.begin()
    way.await_tickets(1)
    way.copier.fail("link down")
    with pytest.raises(WeightsEvicted, match="link down"):
        arrival.await_stage(3)
    eventually(lambda: arrival.is_lost)


def test_too_many_copies_are_a_loss_too(way):
    way.copier.is_full = True
    way.host.have(4)
    arrival = way.begin()
    with pytest.raises(WeightsEvicted, match="too many"):
        arrival.await_stage(0)
