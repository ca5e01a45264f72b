"""What is told of the times that actions took."""

from aegaeon.types import Loaded, Prefill, Stepped, Switched
from tests.support.policies import make_scheduler
from tests.support.scripted import LOAD_S, STEP_S, ScriptedDevice
from tests.support.specs import make_request


class Notes:
    def __init__(self):
        self.said = []

    def prefilled(self, model, lengths, cached, took_s):
        assert len(cached) == len(lengths)
        self.said.append(("prefill", model, list(lengths), took_s))

    def decoded(self, model, contexts, took_s):
        self.said.append(("decode", model, list(contexts), took_s))

    def loaded(self, model, took_s):
        self.said.append(("load", model, took_s))


def test_an_observer_hears_of_loads_and_steps_with_the_lengths_before_them(policy):
    device = ScriptedDevice(make_scheduler(policy, {"a": 1}, 1), {"a": 1}, 1)
    notes = device.scheduler.observer = Notes()
    device.submit(make_request("r", "a", max_tokens=3))  # a prompt of 3 tokens
    device.advance(5.0)
    assert notes.said == [
        ("load", "a", LOAD_S),
        ("prefill", "a", [3], STEP_S),
        ("decode", "a", [4], STEP_S),
        ("decode", "a", [5], STEP_S),
    ]


def test_steps_in_which_somebody_lost_kv_or_was_cancelled_tell_nothing(policy):
    scheduler = make_scheduler(policy, {"a": 1}, 1)
    device = ScriptedDevice(scheduler, {"a": 1}, 1, kv_slots=1)
    notes = scheduler.observer = Notes()
    device.submit(make_request("r", "a", max_tokens=2))
    device.submit(make_request("s", "a", max_tokens=2))
    device.advance(60.0)
    assert device.ends == {"r": "finished", "s": "finished"}
    prefills = [said for said in notes.said if said[0] == "prefill"]
    assert set(map(str, prefills)) == {str(("prefill", "a", [3], STEP_S))}
    assert len(prefills) < sum(isinstance(step, Prefill) for step in device.steps)


def test_a_step_in_which_somebody_had_no_token_tells_nothing(policy):
    """Its grammar's word was late, or it waited for KV on its way: the others' step says little."""
    scheduler = make_scheduler(policy, {"a": 1}, 1)
    notes = scheduler.observer = Notes()
    scheduler.submit(make_request("r", "a"), 0.0)
    assert scheduler.next_load(0.0).model == "a"
    scheduler.complete(Loaded("a", 1, LOAD_S), LOAD_S)
    action = scheduler.next_action(LOAD_S)
    while not isinstance(action, Prefill):
        scheduler.complete(Switched("a", 0.0), LOAD_S)
        action = scheduler.next_action(LOAD_S)
    notes.said.clear()
    scheduler.complete(Stepped("a", (), STEP_S), LOAD_S + STEP_S)
    assert notes.said == []
    assert scheduler.next_action(LOAD_S + STEP_S) == action


def test_a_load_whose_last_layers_still_come_teaches_nothing(policy):
    scheduler = make_scheduler(policy, {"a": 1}, 1)
    notes = scheduler.observer = Notes()
    scheduler.submit(make_request("r", "a"), 0.0)
    assert scheduler.next_load(0.0).model == "a"
    scheduler.complete(Loaded("a", 1, LOAD_S / 10, is_whole=False), LOAD_S / 10)
    assert notes.said == []
