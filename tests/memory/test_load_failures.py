"""A model that comes into the cache: what those who wait for it are told when it does not."""

import threading

import pytest

from aegaeon.errors import CheckpointError, LoadCancelled, RegionError, WeightsEvicted
from aegaeon.memory import host_model
from aegaeon.memory.host_model import HostModel, Reading
from aegaeon.memory.traffic import Traffic
from aegaeon.models.checkpoint import plan_load
from aegaeon.models.packing import plan_pack
from tests.support.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return plan_pack(plan_load(make_checkpoint(tmp_path_factory.mktemp("m"), "llama")))


class AbandonedModel:
    """Nothing of it is in, and its load is always there to be taken over."""

    is_loader = True
    stages_done = 0

    def __init__(self, failure):
        self.failure = failure
        self.loads = 0
        self.may_load = threading.Event()

    def wait_stage(self, count, timeout_s):
        self.may_load.set()
        return False

    def take_over(self):
        return True

    def load(self, jobs, threads):
        self.may_load.wait()
        self.loads += 1
        raise self.failure

    def pin(self):
        return True

    def unpin(self):
        pass


@pytest.mark.parametrize(
    ("failure", "told"),
    [(MemoryError("no room"), CheckpointError), (ValueError("odd"), CheckpointError),
     (CheckpointError("gone"), CheckpointError), (RegionError("closed"), RegionError)],
)  # fmt: skip
def test_a_load_that_fails_is_told_and_not_tried_again(plan, failure, told):
    model = AbandonedModel(failure)
    host = HostModel("m", plan, model, Reading(1, Traffic()))
    for _ in range(2):
        with pytest.raises(told, match=str(failure)):
            host.await_stage(0)
    assert model.loads == 1
    assert not host.is_present


def test_a_load_that_is_always_cancelled_is_given_up(plan, monkeypatch):
    monkeypatch.setattr(host_model, "STAGE_S", 0.05)
    host = HostModel("m", plan, AbandonedModel(LoadCancelled("again")), Reading(1, Traffic()))
    with pytest.raises(CheckpointError, match="has not come"):
        host.await_stage(0)


def test_what_is_in_is_told_without_waiting_and_shown_while_it_is_pinned(plan):
    model = AbandonedModel(LoadCancelled("enough"))
    host = HostModel("m", plan, model, Reading(1, Traffic()))
    model.stages_done = 2
    assert host.is_in(1) and not host.is_in(2)
    with host.cached(1) as one, host.cached(2) as other:
        assert (one, other) == (model, None)
    model.pin = lambda: False
    with pytest.raises(WeightsEvicted), host.cached(1):
        pass
    model.may_load.set()
