"""Models that come in the background: in turn, again after failures, and not when unwanted."""

import threading

from aegaeon.errors import CannotStore
from aegaeon.transfer.bringing import BACKOFF_S, Bringing, Wanted
from aegaeon.transfer.fetch import Sources, fetch
from tests.support.polling import eventually
from tests.support.sharing import SECRET, assert_same, make_large, sharing

ONE, TWO, THREE = (Wanted(f"id of {name}", name) for name in ("one", "two", "three"))


class Bringer:
    """In the place of `fetch`: holds each model until it is let go, or fails it."""

    def __init__(self):
        self.begun, self.sources = [], []
        self.gates, self.failures = {}, {}

    def __call__(self, name, _, sources, progress):
        self.begun.append(name)
        self.sources.append(sources)
        if name in self.failures:
            raise self.failures[name]
        gate = self.gates.setdefault(name, threading.Event())
        while not gate.wait(0.01):
            progress(1, 4)


def told(_, failures):
    return Sources(has_hub=failures > 0)


def bringing(tmp_path, bring, lanes=2):
    clock = [100.0]
    return Bringing(tmp_path, bring, lanes, lambda: clock[0]), clock


def test_some_come_at_once_and_others_after_them(tmp_path):
    bring = Bringer()
    ways, _ = bringing(tmp_path, bring)
    ways.want((ONE, TWO, THREE), told)
    eventually(lambda: sorted(bring.begun) == ["one", "two"])
    eventually(lambda: ways.coming()[ONE.id].share == 0.25)
    assert ways.coming()[THREE.id].total_bytes == 0
    bring.gates["one"].set()
    eventually(lambda: ONE.id not in ways.coming())
    ways.want((TWO, THREE), told)
    eventually(lambda: bring.begun[2:] == ["three"])
    ways.close()


def test_one_that_fails_is_tried_again_later_and_keeps_no_other_waiting(tmp_path):
    bring = Bringer()
    bring.failures["one"] = CannotStore("no room is left; free some")
    ways, clock = bringing(tmp_path, bring, lanes=1)
    for failures, wait_s in enumerate((*BACKOFF_S, BACKOFF_S[-1])):
        ways.want((ONE,), told)
        eventually(lambda wait_s=wait_s: ways.coming()[ONE.id].again_s == wait_s)
        assert len(bring.begun) == failures + 1
        assert ways.coming()[ONE.id].failure == "no room is left; free some"
        ways.want((ONE,), told)  # too early
        clock[0] += wait_s - 0.1
        ways.want((ONE,), told)
        assert len(bring.begun) == failures + 1
        clock[0] += 0.2
    assert [sources.has_hub for sources in bring.sources[:3]] == [False, True, True]
    clock[0] -= 0.2
    ways.want((ONE, TWO), told)
    eventually(lambda: bring.begun[-1] == "two")
    ways.close()


def test_a_crash_is_of_one_model_alone(tmp_path):
    bring = Bringer()
    bring.failures["one"] = ZeroDivisionError("a bug")
    ways, _ = bringing(tmp_path, bring)
    ways.want((ONE, TWO), told)
    eventually(lambda: "crashed (a bug)" in ways.coming()[ONE.id].failure)
    assert not ways.coming()[TWO.id].failure
    ways.close()


def test_what_is_wanted_no_more_is_broken_off_and_goes_on_when_wanted_again(tmp_path):
    held, root = tmp_path / "held", tmp_path / "root"
    make_large(held / "Org__large")
    with sharing(held) as share:
        gate = threading.Event()

        def slowly(name, models_dir, sources, progress):
            def held_up(done, total):
                progress(done, total)
                gate.wait(30)
                progress(done, total)

            fetch(name, models_dir, sources, held_up)

        ways = Bringing(root, slowly)
        large = Wanted("large", "Org/large")
        peers = Sources(peers=(f"127.0.0.1:{share.port}",), secret=SECRET, has_hub=False)
        ways.want((large,), lambda *_: peers)
        eventually(lambda: ways.coming()["large"].done_bytes)
        ways.want((), lambda *_: peers)
        assert ways.coming() == {}
        gate.set()
        ways.close()
        assert not (root / "Org__large").exists()
        assert (root / ".Org__large.fetch").is_dir()
        again = Bringing(root)
        again.want((large,), lambda *_: peers)
        eventually((root / "Org__large").is_dir)
        again.close()
    assert_same(held / "Org__large", root / "Org__large")


def test_it_says_what_was_tried(tmp_path):
    ways = Bringing(tmp_path)
    ways.want((ONE,), lambda *_: Sources(shared_dirs=(str(tmp_path / "no"),), has_hub=False))
    eventually(lambda: ways.coming()[ONE.id].failure)
    assert "cannot fetch one" in ways.coming()[ONE.id].failure
    assert "name others" in ways.coming()[ONE.id].failure
    ways.close()
