"""Loads to which nothing comes: put off, then failed with a reason."""

from aegaeon.instance.stalls import Stalls
from aegaeon.types import Loaded, LoadFailed, WeightsLost

LOST = WeightsLost("m")


def test_a_load_that_is_put_off_for_long_has_failed_for_a_reason_that_clients_may_read():
    stalls = Stalls(20.0)
    assert stalls.judge(LOST, 100.0, 103.0) == LOST
    assert stalls.judge(WeightsLost("other"), 104.0, 107.0) == WeightsLost("other")
    assert stalls.judge(LOST, 118.0, 119.0) == LOST
    failed = stalls.judge(LOST, 119.0, 120.0)
    assert isinstance(failed, LoadFailed)
    assert (failed.model, failed.code) == ("m", "model_loading")
    assert "long in coming" in failed.message
    assert "20 s" in failed.message
    assert stalls.failed == {"m": failed.message}
    assert stalls.judge(LOST, 130.0, 133.0) == LOST  # whoever asks next waits anew


def test_what_has_come_after_all_begins_anew():
    stalls = Stalls(20.0)
    stalls.judge(LOST, 100.0, 103.0)
    loaded = Loaded("m", 10, 1.0)
    stalls.judge(LoadFailed("m", "checkpoint_error", "broken"), 104.0, 104.0)
    assert stalls.failed == {"m": "broken"}
    assert stalls.judge(loaded, 104.0, 105.0) == loaded
    assert stalls.failed == {}
    assert stalls.judge(LOST, 200.0, 203.0) == LOST
