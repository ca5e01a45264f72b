"""Room at a proxy: bounded for all together, and of the last of it no key takes another's share."""

import random
from collections import Counter

import msgspec
import pytest

from aegaeon.config import check_settings
from aegaeon.errors import InvalidRequest, KeyQueueFull, ModelLoading, QueueFull, TooManyOpen
from aegaeon.keeper import bounds_of
from aegaeon.proxy.generation import TOKEN_BYTES
from aegaeon.proxy.queue import Queue
from tests.proxy.test_gateway import generation
from tests.support.specs import make_spec


def make(**settings):
    return Queue(check_settings({"colocated_count": 1, **settings}))


def asked(key="", weight=1.0, tokens=1):
    return generation(key=key, weight=weight, prompt_token_ids=(1,) * tokens)


def fill(queue, one, places=None):
    """Enter `one` until there is no room for it; return how often that was."""
    for count in range(10_000):
        try:
            place = queue.enter(one)
        except QueueFull:
            return count
        if places is not None:
            places.append(place)
    raise AssertionError("the room has no end")


def test_without_keys_all_room_is_there_for_whoever_comes():
    queue, places = make(max_waiting=64), []
    assert fill(queue, asked(), places) == 64
    queue.leave(places[0])
    assert fill(queue, asked()) == 1


def test_those_that_have_begun_wait_no_more():
    queue, places = make(max_waiting=4), []
    assert fill(queue, asked("a"), places) == 4
    for _ in range(2):  # told twice
        queue.begin(places[0])
    assert fill(queue, asked("a")) == 1
    for place in places:
        queue.leave(place)
    assert fill(queue, asked("a")) == 3
    assert queue._held["a"].requests == queue._held["a"].waiting == 4


def test_lower_priorities_have_less_room():
    queue = make(max_waiting=64)
    names = ("low", "normal", "high")
    ranked = [msgspec.structs.replace(make_spec(name), priority=name) for name in names]
    queue.serve(ranked)
    for name, room in (("low", 48), ("normal", 8), ("high", 8)):
        assert fill(queue, generation(model=name)) == room
    queue = make(max_waiting=64)
    queue.serve(ranked[:2])
    assert fill(queue, generation(model="low")) == 56
    with pytest.raises(QueueFull, match="higher priority"):
        queue.enter(generation(model="low"))
    assert fill(queue, generation(model="normal")) == 8


@pytest.mark.parametrize("most", [8, 64, 1000])
def test_a_flood_of_one_key_leaves_room_for_others(most):
    queue = make(max_waiting=most)
    assert fill(queue, asked("flood")) == most - most // 8
    with pytest.raises(KeyQueueFull, match="for other keys"):
        queue.enter(asked("flood"))
    others = [fill(queue, asked("other")), fill(queue, asked("third"))]
    assert others[0] >= 1
    assert sum(others) <= most // 8
    assert most == 8 or others[1] >= 1


def test_one_key_alone_may_have_the_only_room():
    assert fill(make(max_waiting=1), asked("a")) == 1
    assert fill(make(max_waiting=7), asked("a")) == 7


def test_room_that_comes_free_goes_to_keys_below_their_share():
    queue, chance = make(max_waiting=800), random.Random(5)
    keys = {"light": 1.0, "heavy": 3.0}
    places = []
    fill(queue, asked("light"), places)
    for _ in range(20_000):
        # Both ask for more all the time, and requests end in no particular order.
        for key, weight in sorted(keys.items(), key=lambda _: chance.random()):
            fill(queue, asked(key, weight), places)
        over = chance.randrange(len(places))
        places[over], places[-1] = places[-1], places[over]
        queue.leave(places.pop())
    held = Counter(place.generation.key for place in places)
    assert held["light"] == pytest.approx(700 / 4, abs=2)
    assert held["heavy"] == pytest.approx(700 * 3 / 4, abs=2)


def test_prompts_are_shared_like_requests():
    queue = make(max_waiting=1024, max_open_mb=80 * 100 * TOKEN_BYTES / 1e6)
    large, places = asked("flood", tokens=100), []
    assert fill(queue, large, places) == 70
    with pytest.raises(KeyQueueFull, match="MB held"):
        queue.enter(large)
    assert fill(queue, asked("other", tokens=100), places) == 7
    assert fill(queue, asked("third", tokens=100), places) == 1
    for place in places:
        queue.begin(place)  # it still holds its prompt
    assert fill(queue, asked("flood", tokens=100)) == 0
    for place in places:
        queue.leave(place)
    queue.enter(asked("flood", tokens=100_000))  # alone, it may be of any size


class Told:
    """An outlook that keeps `places`, of which `due` are to be taken now; the models of `there`
    have their weights."""

    def __init__(self, places, due=0, there=()):
        self.places, self.due, self.waits, self.there = places, due, [], frozenset(there)

    def resident(self):
        return self.there

    def kept(self):
        return self.places

    def was_told(self, _):
        self.due -= 1
        return self.due >= 0

    def wait_s(self, *asked):
        self.waits.append(asked)
        return 7.0


def test_room_is_kept_for_those_who_were_told_to_come():
    outlook = Told(places=3)
    queue = Queue(check_settings({"colocated_count": 1, "max_waiting": 16}), outlook)
    assert fill(queue, asked()) == 13
    with pytest.raises(QueueFull, match="told to come") as refused:
        queue.enter(asked())
    assert refused.value.retry_after_s == 7.0
    assert outlook.waits[-1] == ("waiting", None, 3)
    outlook.due = 1
    assert fill(queue, asked()) == 1
    # A key that has nothing open is nobody's flood.
    assert fill(queue, asked("new")) == 1
    outlook.due = 5
    assert fill(queue, asked()) == 1  # no more than there is
    assert outlook.waits[-1] == ("waiting", None, 0)


@pytest.mark.parametrize(("most", "room"), [(1, 0), (2, 0), (4, 1), (16, 4)])
def test_not_all_of_a_large_room_is_kept(most, room):
    assert (
        fill(
            Queue(check_settings({"colocated_count": 1, "max_waiting": most}), Told(places=99)),
            asked(),
        )
        == room
    )


def test_what_has_begun_counts_among_all_that_is_open():
    queue, places = make(max_waiting=4, max_open=6), []
    assert fill(queue, asked(), places) == 4
    for place in places:
        queue.begin(place)
    assert fill(queue, asked(), places) == 2
    for place in places:
        queue.begin(place)
    with pytest.raises(TooManyOpen, match=r"6 requests are open.*raise --max-open"):
        queue.enter(generation(model="another"))
    queue.leave(places[0])
    assert fill(queue, asked()) == 1


def test_of_all_that_may_be_open_a_key_has_its_share():
    queue, places = make(max_waiting=1000, max_open=80), []
    assert fill(queue, asked("flood"), places) == 70
    for place in places:
        queue.begin(place)
    with pytest.raises(KeyQueueFull, match="70 requests open"):
        queue.enter(asked("flood"))
    assert fill(queue, asked("other")) == 8


def test_open_requests_are_bounded_for_each_instance_and_while_serving():
    queue = make(max_open=3, colocated_count=2)
    assert fill(queue, asked()) == 6
    queue.bound(bounds_of(check_settings({"colocated_count": 1, "max_open": 2})))
    with pytest.raises(TooManyOpen, match="4 requests are open"):
        queue.enter(asked())
    queue.bound(bounds_of(check_settings({"colocated_count": 1, "max_open": 4})))
    assert fill(queue, asked()) == 2


def test_those_who_wait_for_weights_leave_room_for_models_that_are_there():
    outlook = Told(places=0, there=["hot"])
    queue, places = Queue(check_settings({"colocated_count": 1, "max_waiting": 16}), outlook), []
    assert fill(queue, generation(model="cold"), places) == 12
    with pytest.raises(ModelLoading, match=r"'icy' must be loaded first, and 12 .*--max-waiting"):
        queue.enter(generation(model="icy"))
    assert outlook.waits[-1] == ("loading", None, 0)
    assert fill(queue, generation(model="hot"), places) == 4
    assert outlook.waits[-1] == ("waiting", None, 0)
    for place in places[:2]:
        queue.begin(place)
    assert fill(queue, generation(model="icy")) == 2


@pytest.mark.parametrize("there", [[], ["cold"]])
def test_where_nothing_is_held_up_by_loads_they_may_have_all_room(there):
    queue = Queue(
        check_settings({"colocated_count": 1, "max_waiting": 16}), Told(places=0, there=there)
    )
    assert fill(queue, generation(model="cold")) == 16


def many(count, **fields):
    return [generation(**fields) for _ in range(count)]


def test_choices_of_one_answer_find_room_together_or_not_at_all():
    queue = make(max_waiting=8)
    place = queue.enter(asked())
    with pytest.raises(QueueFull, match="1 requests are waiting, and 8 more are asked for at once"):
        queue.enter_all(many(8))
    assert queue._waiting == queue._open == 1
    queue.leave(place)
    places = queue.enter_all(many(8))
    assert len(places) == queue._waiting == 8
    for place in places:
        queue.leave(place)
    assert (queue._waiting, queue._bytes, queue._held) == (0, 0, {})


@pytest.mark.parametrize("key", ["", "a"])
@pytest.mark.parametrize("there", [[], ["hot"]])
@pytest.mark.parametrize("count", range(1, 17))
def test_so_many_as_there_is_room_for_are_never_refused_for_ever(count, there, key):
    queue = Queue(check_settings({"colocated_count": 1, "max_waiting": 16}), Told(0, there=there))
    running = queue.enter(asked("another"))
    queue.begin(running)
    if key and count > 14:  # the last of it is for others, alone or not
        with pytest.raises(InvalidRequest, match="at most 14"):
            queue.enter_all(many(count, key=key))
    else:
        assert len(queue.enter_all(many(count, key=key))) == count


def test_more_than_there_is_room_for_is_the_clients_to_change():
    queue = make(max_waiting=64, max_open=60)
    names = ("low", "high")
    queue.serve([msgspec.structs.replace(make_spec(name), priority=name) for name in names])
    with pytest.raises(InvalidRequest, match=r"49 choices.*at most 48 of 'low'.*--max-waiting"):
        queue.enter_all(many(49, model="low"))
    with pytest.raises(InvalidRequest, match=r"at most 60 of 'high'.*raise --max-open$"):
        queue.enter_all(many(61, model="high"))
    assert len(queue.enter_all(many(48, model="low"))) == 48
    large = make(max_open_mb=0.1)
    with pytest.raises(InvalidRequest, match=r"take 0.4 MB.*raise --max-open-mb"):
        large.enter_all(many(10, prompt_token_ids=(1,) * 1000))


def test_choices_at_once_take_no_more_of_the_last_room_than_a_keys_share():
    queue = make(max_waiting=64)
    queue.enter(asked("other"))
    with pytest.raises(KeyQueueFull):
        queue.enter_all(many(56, key="flood"))
    assert len(queue.enter_all(many(50, key="flood"))) == 50
