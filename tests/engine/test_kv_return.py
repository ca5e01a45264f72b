"""Bringing keys and values out: what goes wrong once does not end it for ever."""

import threading

from aegaeon.engine.kv_return import Return
from tests.support.polling import eventually


class Spilling:
    """Fails the first time, and has nothing to bring out; counts how often it was asked."""

    ticket = None

    def __init__(self):
        self.asked = 0

    def begin(self):
        self.asked += 1
        if self.asked == 1:
            raise ValueError("a mistake of ours")

    def stop(self):
        pass


def test_what_fails_is_logged_and_the_next_time_begins_anew(caplog):
    spill, lock = Spilling(), threading.Lock()
    returning = Return(spill, lock)
    with lock:
        returning.begin()
    eventually(lambda: "a mistake of ours" in caplog.text)

    def is_asked_again():
        with lock:
            returning.begin()
        return spill.asked > 1

    eventually(is_asked_again)
    returning.close()
