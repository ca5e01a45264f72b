"""What requests wait for: no second lost, none counted twice, wherever they go."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegaeon.instance.waits import State, Waits
from aegaeon.measures import NOT_WAITED, Waited
from aegaeon.types import Decode, Load, Prefill, Stepped, Switch, Switched, TokenEvent, WeightsLost
from tests.support.bench import Bench
from tests.support.node import Node, assert_served, settle, until
from tests.support.specs import make_request


def seconds(waited):
    return (waited.queue_s, waited.switch_s, waited.preempted_s)


class Story:
    """Waits that are told what the lanes do, one second after another unless said."""

    def __init__(self):
        self.waits, self.now = Waits(), 0.0

    def switch(self, model, took_s=1.0):
        self.waits.begin(Switch(model), self.now)
        self.now += took_s
        self.waits.end(Switch(model), Switched(model, took_s), self.now)

    def load(self, model, took_s=1.0, evict=()):
        self.waits.begin_load(Load(model, evict), self.now)
        self.now += took_s
        self.waits.end_load(Load(model, evict), self.now)

    def step(self, model, took_s=1.0):
        decode = Decode(model, ("x",))
        self.waits.begin(decode, self.now)
        self.now += took_s
        self.waits.end(decode, Stepped(model, (), took_s), self.now)

    def enter(self, model="a", **changes):
        request = make_request("r", model, arrival_s=self.now, **changes)
        return self.waits.enter(request, self.now)

    def put(self, wait, state):
        self.waits.note(wait, state, self.now)

    def waited(self, wait):
        return self.waits.waited(wait, self.now)


def test_a_cold_request_waits_in_the_queue_then_for_its_weights():
    story = Story()
    wait = story.enter()
    story.step("b", 3.0)
    story.load("a", 5.0)
    story.switch("a", 0.5)
    story.put(wait, State.AT_WORK)
    story.step("a", 2.0)
    assert story.waited(wait) == Waited(3.0, 5.5, 1, 0.0, 5.0)


def test_the_turns_of_others_are_pre_emption_and_the_way_back_is_a_switch():
    story = Story()
    wait = story.enter()
    story.switch("a")
    story.put(wait, State.AT_WORK)
    story.step("a", 4.0)
    story.switch("b", 0.5)
    story.step("b", 6.0)
    story.switch("a", 0.25)
    story.step("a", 1.0)
    assert story.waited(wait) == Waited(0.0, 1.25, 2, 6.5)


def test_a_request_that_lost_its_kv_is_pre_empted_though_its_model_has_the_device():
    story = Story()
    wait = story.enter()
    story.switch("a")
    story.put(wait, State.AT_WORK)
    story.put(wait, State.PUT_BACK)
    story.step("a", 3.0)
    story.put(wait, State.AT_WORK)
    story.step("a", 2.0)
    assert seconds(story.waited(wait)) == (0.0, 1.0, 3.0)


def test_a_load_beside_anothers_turn_counts_once():
    story = Story()
    wait = story.enter()
    story.waits.begin_load(Load("a"), story.now)
    story.step("b", 2.0)
    story.waits.begin(Switch("a"), story.now)  # its first layers are in
    story.now += 1.0
    story.waits.end(Switch("a"), Switched("a", 1.0), story.now)
    story.waits.end_load(Load("a"), story.now)
    assert story.waited(wait) == Waited(0.0, 3.0, 1, 0.0, 3.0)


@pytest.mark.parametrize("how", ["lost", "evicted"])
def test_the_turn_ends_with_the_weights(how):
    story = Story()
    wait = story.enter()
    story.switch("a", 0.0)
    story.put(wait, State.AT_WORK)
    if how == "lost":
        decode = Decode("a", ("r",))
        story.waits.begin(decode, story.now)
        story.waits.end(decode, WeightsLost("a"), story.now)
        story.now += 2.0
    else:
        story.load("b", 2.0, evict=("a",))
    assert seconds(story.waited(wait)) == (0.0, 0.0, 2.0)


def test_what_was_waited_elsewhere_comes_first():
    story = Story()
    story.now = 10.0
    before = Waited(1.0, 2.0, 3, 4.0)
    wait = story.enter(generated_token_ids=(1,), waited=before)
    story.now += 5.0
    assert story.waited(wait) == Waited(1.0, 2.0, 3, 9.0)


def test_a_request_without_tokens_has_waited_since_its_arrival():
    story = Story()
    story.now = 10.0
    wait = story.waits.enter(make_request("r", "a", arrival_s=4.0), 10.0)
    assert story.waited(wait) == Waited(6.0)


def test_news_come_first_last_and_after_a_switch():
    story = Story()
    wait = story.enter()
    story.switch("a")
    assert story.waits.news(wait, False, story.now) == Waited(0.0, 1.0, 1, 0.0)
    assert story.waits.news(wait, False, story.now) is None
    story.switch("b")
    story.switch("a")
    assert story.waits.news(wait, False, story.now) is not None
    assert story.waits.news(wait, True, story.now) is not None


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["step", "switch", "load", "work", "back"]),
        st.sampled_from("ab"),
        st.floats(0.0, 9.0),
    ),
    max_size=30,
)


@given(EVENTS)
def test_what_is_waited_for_is_never_more_than_the_time_there_was(events):
    story = Story()
    wait, before = story.enter(), NOT_WAITED
    for kind, model, took_s in events:
        match kind:
            case "step" | "switch" | "load":
                getattr(story, kind)(model, took_s)
            case "work":
                story.put(wait, State.AT_WORK)
            case "back" if wait.state is State.AT_WORK:
                story.put(wait, State.PUT_BACK)
        waited = story.waited(wait)
        assert sum(seconds(waited)) <= story.now + 1e-9
        for earlier, later in zip(seconds(before), seconds(waited), strict=True):
            assert later >= earlier - 1e-9
        before = waited


# In an instance


def test_the_first_and_the_last_token_tell_what_the_request_waited_for():
    bench = Bench()
    bench.now = 5.0
    bench.turn()
    bench.submit("r", arrival_s=5.0)
    bench.turn()
    bench.now += 2.0
    bench.copy.finish()
    bench.work()
    tokens = [reply for reply in bench.replies() if isinstance(reply, TokenEvent)]
    assert [reply.waited is not None for reply in tokens] == [True, False, False, True]
    last = tokens[-1].waited
    assert last.switch_s == pytest.approx(2.0, abs=0.01) and last.switches == 1
    assert last.queue_s == pytest.approx(0.0, abs=0.01)
    assert last.preempted_s == pytest.approx(0.0, abs=0.01)


def test_a_request_behind_another_models_prefill_waits_in_the_queue():
    bench = Bench()
    bench.submit("r", max_tokens=2)
    bench.until(Prefill)
    bench.submit("s", "b", arrival_s=bench.now, max_tokens=2)
    bench.turn()
    bench.copy.finish()
    bench.turn()
    bench.now += 3.0
    bench.work(60)
    last = [r for r in bench.replies() if r.request_id == "s"][-1]
    assert sum(seconds(last.waited)) == pytest.approx(3.0, abs=0.1)
    assert last.waited.queue_s > 2.5


def test_waits_go_with_a_request_that_is_handed_over():
    node = Node(p="prefill", d="decode")
    node.proxy.ask("r", max_tokens=4)
    node.now += 7.0  # nobody looks
    settle(node)
    assert_served(node)
    events = [reply for reply in node.proxy.replies if isinstance(reply, TokenEvent)]
    assert {event.instance for event in events} == {"p", "d"}
    last = events[-1]
    assert last.instance == "d" and last.waited.queue_s >= 7.0
    assert last.waited.switches == 2  # of either device
    assert sum(seconds(last.waited)) <= node.now


def test_waits_are_remembered_when_an_instance_dies():
    node = Node(a="colocated", b="colocated")
    node.proxy.ask("r", max_tokens=8)
    node.now += 5.0
    until(node, lambda: len(node.proxy.got["r"]) >= 2)
    opened = node.proxy.opened["r"]
    first = opened.waited
    assert first.queue_s >= 5.0
    node.kill(opened.target.instance)
    node.now += 3.0
    settle(node)
    assert_served(node)
    assert opened.waited.queue_s == first.queue_s
    assert opened.waited.preempted_s >= 3.0
    assert opened.waited.switches == first.switches + 1
