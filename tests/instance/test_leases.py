"""An instance without a lease begins nothing and tells nothing, until it is known who it is."""

import pytest

from aegaeon.errors import StaleIncarnation, StoreUnavailable
from aegaeon.instance.outbox import GONE_S
from aegaeon.store.codec import encode
from aegaeon.types import Decode, InstanceStatus, Load, Prefill, TokenEvent
from tests.support.bench import Bench

LEASE_S = 8.0  # of the bench


class CutBench(Bench):
    """A bench that can be cut off from its store: whatever it asks there is in vain."""

    def __init__(self, **options):
        super().__init__(**options)
        self.is_cut = False
        self.open = self.domain.open_mailbox
        for store, name in (
            *((self.store, verb) for verb in ("update_instance_status", "register_instance")),
            *((self.inbox, "receive"), (self.domain, "open_mailbox")),
        ):
            setattr(store, name, self.cuttable(getattr(store, name)))
        self.runtime._parts.outbox._open = self.domain.open_mailbox

    def send(self, message):
        """As a proxy, which is not cut off."""
        self.open("i.1").send(encode(message))

    def cuttable(self, verb):
        def call(*arguments):
            if self.is_cut:
                raise StoreUnavailable("cut off")
            found = verb(*arguments)
            if hasattr(found, "send"):  # a mailbox
                found.send = self.cuttable(found.send)
            return found

        return call

    def pass_time(self, seconds, step_s=0.25):
        """Let so much time pass, in which the lanes end what they are given."""
        for _ in range(round(seconds / step_s)):
            self.now += step_s
            self.turn()
            self.compute.finish()
            self.copy.finish()


def running(bench):
    """A request in the middle of its tokens; returns how many have come."""
    bench.submit("r", max_tokens=1000)
    bench.work(20)
    return len(tokens(bench))


def tokens(bench):
    return [reply for reply in bench.replies() if isinstance(reply, TokenEvent)]


def test_one_that_is_cut_off_begins_nothing_once_its_lease_is_over():
    bench = CutBench()
    assert running(bench)
    cut_s = bench.now
    bench.is_cut = True
    begun_s = []
    start = bench.compute.start
    bench.compute.start = lambda action: (begun_s.append(bench.now), start(action))
    bench.pass_time(3 * LEASE_S)
    # Until then it serves on: the store may be back in time.
    assert cut_s + LEASE_S / 2 < max(begun_s) < cut_s + LEASE_S
    assert not bench.compute.is_busy


@pytest.mark.parametrize("kind", [Prefill, Decode, Load])
def test_what_is_under_way_when_the_lease_ends_ends_and_nothing_follows(kind):
    bench = CutBench()
    bench.submit("r", max_tokens=1000)
    lane = bench.copy if kind is Load else bench.compute
    if kind is Load:
        bench.turn()
    else:
        bench.until(kind)
    assert isinstance(lane.action, kind)
    bench.is_cut = True
    bench.now += LEASE_S
    for _ in range(3):
        bench.turn()
        lane.finish()
    assert not bench.compute.is_busy and not bench.copy.is_busy


def test_the_lease_is_counted_from_before_its_renewal_was_sent():
    bench = CutBench()
    update, sent_s = bench.store.update_instance_status, []

    def slow(*arguments):
        sent_s.append(bench.now)
        update(*arguments)
        bench.now += 3.0  # the answer takes its time

    bench.store.update_instance_status = slow
    bench.submit("r", max_tokens=1000)
    bench.work(20)
    presence, ends_s = bench.runtime._parts.presence, sent_s[-1] + LEASE_S
    assert presence.is_held(ends_s - 0.01) and not presence.is_held(ends_s + 0.01)


def test_whose_lease_goes_on_goes_on_with_all_it_had():
    bench = CutBench()
    made = running(bench)
    bench.is_cut = True
    bench.submit("s", max_tokens=3)
    bench.pass_time(LEASE_S - 0.5)
    bench.is_cut = False
    bench.pass_time(1.0)
    bench.work(40)
    told = tokens(bench)
    mine = [reply.position for reply in told if reply.request_id == "r"]
    assert mine == list(range(made, made + len(mine)))
    assert [reply.position for reply in told if reply.request_id == "s"] == [0, 1, 2]


def test_one_whose_requests_have_gone_elsewhere_ends_without_a_word():
    bench = CutBench()
    running(bench)
    bench.is_cut = True
    bench.pass_time(LEASE_S + 1.0)
    assert bench.domain.metadata().sync_for_routing() == ()
    bench.is_cut = False
    bench.submit("s")
    with pytest.raises(StaleIncarnation):
        bench.turn()
    assert bench.replies() == []
    assert not bench.compute.is_busy


def test_one_that_was_stopped_past_its_lease_does_nothing_when_it_wakes():
    """As SIGSTOP and SIGCONT do, anywhere in its turn: no try was in vain, time has passed."""
    bench = CutBench()
    running(bench)
    bench.compute.finish()
    bench.submit("s")
    receive = bench.inbox.receive

    def stopped(*arguments):
        records = receive(*arguments)
        bench.now += 2 * LEASE_S
        return records

    bench.inbox.receive = stopped
    with pytest.raises(StaleIncarnation):
        bench.turn()
    assert bench.replies() == []
    assert not bench.compute.is_busy


def test_messages_that_came_as_the_lease_ended_are_not_lost_where_it_goes_on():
    bench = CutBench()
    bench.turn()
    receive = bench.inbox.receive

    def late(*arguments):
        records = receive(*arguments)
        if records:
            bench.now += 2 * LEASE_S
            # As where the store was silent, too: it enters whoever comes back.
            bench.store.register_instance(bench.runtime._parts.presence.record, LEASE_S)
        return records

    bench.inbox.receive = late
    bench.submit("s", max_tokens=3)
    bench.turn()
    bench.turn()
    bench.work(40)
    assert [reply.position for reply in tokens(bench)] == [0, 1, 2]


def test_the_models_that_are_served_are_no_way_round_an_ended_lease():
    bench = CutBench()
    bench.turn()
    bench.now += LEASE_S
    bench.runtime._parts.presence.serve(("a", "b", "c"))
    assert bench.domain.metadata().sync_for_routing() == ()
    with pytest.raises(StaleIncarnation):
        bench.runtime._parts.presence.publish(InstanceStatus(), bench.now)


def test_nothing_begins_or_is_told_where_the_lease_ended_in_the_midst_of_a_turn():
    bench = CutBench()
    assert running(bench)
    bench.turn()
    bench.compute.finish()  # its tokens are told in the next turn
    bench.replies()
    look_up = bench.runtime._requests.look_up

    def look_long(now):
        look_up(now)
        bench.now += LEASE_S  # the store was slow to answer

    bench.runtime._requests.look_up = look_long
    bench.turn()
    assert not bench.compute.is_busy
    assert bench.replies() == []


def test_a_store_that_is_away_is_no_proxys_fault():
    bench = CutBench(lease_s=100.0)
    made = running(bench)
    bench.is_cut = True
    bench.pass_time(3 * GONE_S)
    bench.is_cut = False
    bench.pass_time(1.0)
    mine = [reply.position for reply in tokens(bench)]
    assert mine == list(range(made, made + len(mine))) and len(mine) > 50


def test_one_that_is_asked_to_end_while_it_is_cut_off_ends():
    bench = CutBench()
    running(bench)
    bench.is_cut = True
    bench.pass_time(LEASE_S + 1.0)
    bench.runtime.drain()
    bench.pass_time(6.0)
    assert bench.runtime.is_drained


def test_no_request_is_to_blame_for_how_one_ends_that_was_cut_off():
    bench = CutBench()
    running(bench)
    assert bench.runtime._parts.at_work.work.requests == ("r",)
    bench.is_cut = True
    bench.pass_time(LEASE_S + 1.0)
    assert bench.runtime._parts.at_work.work.requests == ()
