"""Room at a proxy: bounded for all together, and of the last of it no key takes another's share."""

import random

import pytest

from aegaeon.config import check_settings
from aegaeon.errors import QueueFull
from aegaeon.proxy.generation import TOKEN_BYTES
from aegaeon.proxy.queue import Queue
from tests.proxy.test_gateway import generation


def make(**settings):
    return Queue(check_settings(settings))


def asked(key="", weight=1.0, tokens=1):
    return generation(key=key, weight=weight, prompt_token_ids=(1,) * tokens)


def fill(queue, one):
    """Enter `one` until there is no room for it; return how often that was."""
    for count in range(10_000):
        try:
            queue.enter(one)
        except QueueFull:
            return count
    raise AssertionError("the room has no end")


def test_without_keys_all_room_is_there_for_whoever_comes():
    queue = make(max_waiting=64)
    assert fill(queue, asked()) == 64
    queue.leave(asked())
    assert fill(queue, asked()) == 1


@pytest.mark.parametrize("most", [8, 64, 1000])
def test_a_flood_of_one_key_leaves_room_for_others(most):
    queue = make(max_waiting=most)
    assert fill(queue, asked("flood")) == most - most // 8
    with pytest.raises(QueueFull, match="for other keys"):
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
    held = dict.fromkeys(keys, 0)
    held["light"] = fill(queue, asked("light"))
    for _ in range(20_000):
        # Both ask for more all the time, and requests end in no particular order.
        for key, weight in sorted(keys.items(), key=lambda _: chance.random()):
            held[key] += fill(queue, asked(key, weight))
        over = chance.choices(list(held), list(held.values()))[0]
        queue.leave(asked(over, keys[over]))
        held[over] -= 1
    assert held["light"] == pytest.approx(700 / 4, abs=2)
    assert held["heavy"] == pytest.approx(700 * 3 / 4, abs=2)


def test_prompts_are_shared_like_requests():
    queue = make(max_waiting=1024, max_open_mb=80 * 100 * TOKEN_BYTES / 1e6)
    large = asked("flood", tokens=100)
    assert fill(queue, large) == 70
    with pytest.raises(QueueFull, match="MB open"):
        queue.enter(large)
    assert fill(queue, asked("other", tokens=100)) == 7
    assert fill(queue, asked("third", tokens=100)) == 1
    for key, count in (("flood", 70), ("other", 7), ("third", 1)):
        for _ in range(count):
            queue.leave(asked(key, tokens=100))
    queue.enter(asked("flood", tokens=100_000))  # alone, it may be of any size
