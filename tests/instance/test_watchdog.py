"""An instance says when its compute lane stands."""

from aegaeon.engine.base import EngineUsage
from aegaeon.instance.watchdog import Watchdog
from aegaeon.types import Prefill
from tests.support.bench import Bench


def test_a_lane_is_stuck_after_the_limit_without_progress():
    dog = Watchdog(10.0)
    assert not dog.is_stuck(False, 0, 100.0)
    assert not dog.is_stuck(True, 0, 105.0)
    assert not dog.is_stuck(True, 1, 112.0)  # it has done something
    assert not dog.is_stuck(True, 1, 121.9)
    assert dog.is_stuck(True, 1, 122.0)
    assert not dog.is_stuck(True, 2, 123.0)


def test_an_idle_lane_is_never_stuck_nor_is_any_without_a_limit():
    dog, off = Watchdog(10.0), Watchdog(0.0)
    for now in (0.0, 1e6):
        assert not dog.is_stuck(False, 0, now) and not off.is_stuck(True, 0, now)


def watched(**options):
    bench = Bench(**options)
    object.__setattr__(bench.runtime._parts, "watchdog", Watchdog(10.0))
    return bench


def test_a_step_that_does_not_end_makes_the_instance_stuck_until_it_does():
    bench = watched(lease_s=1e6)
    bench.submit("r", max_tokens=2)
    bench.until(Prefill)
    bench.now += 9.0
    assert bench.status().state == "ready"
    bench.now += 2.0
    assert bench.status().state == "stuck"
    bench.work()
    assert bench.status().state == "ready" and len(bench.replies()) == 2


def test_a_long_step_that_goes_on_is_not_stuck(monkeypatch):
    bench = watched(lease_s=1e6)
    bench.submit("r", max_tokens=2)
    bench.until(Prefill)
    for passes in range(5):
        usage = EngineUsage(0, 1, 0, 1, passes=passes)
        monkeypatch.setattr(bench.engine, "usage", lambda u=usage: u)
        bench.now += 8.0
        assert bench.status().state == "ready"
