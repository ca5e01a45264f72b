"""Who makes room."""

from hypothesis import given
from hypothesis import strategies as st

from aegaeon.scheduler.room import Holder, Room, find_room

INF = float("inf")


def test_nothing_goes_where_there_is_room():
    assert find_room(0, [Holder("a", INF, 9, 9)], -INF) == Room()


def test_who_needs_it_last_goes_first_and_nobody_who_needs_it_sooner():
    holders = [Holder("a", 5.0, 4, 0), Holder("b", INF, 4, 0), Holder("c", 1.0, 4, 0)]
    assert find_room(4, holders, 1.0) == Room(("b",))
    assert find_room(8, holders, 1.0) == Room(("b", "a"))
    assert find_room(9, holders, 1.0) is None


def test_weights_go_before_kv_and_kv_of_resident_weights_stays():
    holders = [Holder("gone", 9.0, 0, 3), Holder("a", 5.0, 4, 2), Holder("b", 4.0, 4, 2)]
    assert find_room(8, holders, 0.0) == Room(("a", "b"))
    assert find_room(10, holders, 0.0) == Room(("a", "b"), ("gone",))
    assert find_room(15, holders, 0.0) == Room(("a", "b"), ("gone", "a", "b"))
    assert find_room(16, holders, 0.0) is None


def test_who_need_not_go_after_all_stays_those_needed_soonest_first():
    holders = [Holder("small", 9.0, 1, 0), Holder("mid", 8.0, 2, 0), Holder("big", 7.0, 4, 0)]
    assert find_room(4, holders, 0.0) == Room(("big",))
    assert find_room(5, holders, 0.0) == Room(("small", "big"))


holders_of = st.lists(
    st.builds(
        Holder, st.uuids().map(str), st.floats(-5, 60), st.integers(0, 30), st.integers(0, 9)
    ),
    max_size=8,
)


@given(st.integers(-5, 120), holders_of, st.floats(-5, 60))
def test_what_goes_is_enough_and_none_of_it_is_needed_too_soon(missing, holders, above_s):
    room = find_room(missing, holders, above_s)
    of = {holder.model: holder for holder in holders}
    if room is None:
        able = [h for h in holders if h.slack_s > above_s]
        assert sum(h.weight_bytes + h.kv_bytes for h in able) < missing
        return
    freed = sum(of[model].weight_bytes for model in room.evict)
    freed += sum(of[model].kv_bytes for model in room.offload)
    assert freed >= missing
    assert all(of[model].slack_s > above_s for model in room.evict + room.offload)
    for model in room.offload:
        assert model in room.evict or not of[model].weight_bytes
