"""Loads of a node beyond the bound wait for one to end, whoever's it is."""

import threading

from aegaeon.instance import load_slots
from aegaeon.instance.load_slots import LoadSlots
from aegaeon.store.names import domain_files
from aegaeon.types import Load, Loaded
from tests.support.polling import eventually


class Engine:
    """Loads take as long as they are held."""

    def __init__(self):
        self.under_way, self.most, self.ends = [], 0, {}
        self.lock = threading.Lock()

    def load(self, action):
        with self.lock:
            self.under_way.append(action.model)
            self.most = max(self.most, len(self.under_way))
            end = self.ends.setdefault(action.model, threading.Event())
        assert end.wait(20.0)
        with self.lock:
            self.under_way.remove(action.model)
        return Loaded(action.model, 1, 0.0)

    def end(self, model):
        self.ends.setdefault(model, threading.Event()).set()


def started(work, *arguments):
    thread = threading.Thread(target=work, args=arguments)
    thread.start()
    return thread


def test_so_many_load_at_once_and_the_others_after_them(tmp_path):
    engine = Engine()
    # As many instances, each with slots of its own.
    loads = [LoadSlots(tmp_path, "d", 2).bounded(engine.load, lambda _: False) for _ in range(5)]
    threads = [started(load, Load(f"m{n}")) for n, load in enumerate(loads)]
    eventually(lambda: len(engine.under_way) == 2)
    for _ in range(5):
        first = engine.under_way[0]
        engine.end(first)
        eventually(lambda model=first: model not in engine.under_way)
        left = sum(thread.is_alive() for thread in threads)
        eventually(lambda: len(engine.under_way) >= min(2, sum(t.is_alive() for t in threads)))
        assert left <= 5
    for thread in threads:
        thread.join(20.0)
    assert engine.most == 2 and not engine.under_way
    assert {path.name for path in domain_files(tmp_path, "d")} == {
        "aegaeon-d.loads+0",
        "aegaeon-d.loads+1",
    }


def test_what_brings_no_weights_waits_for_nobody(tmp_path):
    engine = Engine()
    slots = LoadSlots(tmp_path, "d", 1)
    engine.end("b")
    with slots.held("a"):
        assert slots.bounded(engine.load, lambda _: True)(Load("b")).model == "b"


def test_a_load_that_fails_gives_its_slot_back(tmp_path):
    slots = LoadSlots(tmp_path, "d", 1)

    def broken(_):
        raise ValueError("no")

    for _ in range(2):
        try:
            slots.bounded(broken, lambda _: False)(Load("a"))
        except ValueError:
            continue
        raise AssertionError


def test_nobody_waits_for_ever(tmp_path, caplog):
    pauses = []
    slots = LoadSlots(tmp_path, "d", 1, pause=pauses.append)
    with slots.held("a"), slots.held("b"):
        pass
    assert sum(pauses) <= load_slots.LONGEST_S + 1 and "loading beside" in caplog.text
