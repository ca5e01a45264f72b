"""What a traced request went through, cut into phases by what its instance told."""

from hypothesis import given
from hypothesis import strategies as st

from aegaeon.measures import Waited
from aegaeon.proxy.openai import parse_chat, parse_completion
from aegaeon.proxy.traces import MAX_MARKS, MAX_RUNS, Run, Trace, asked_of
from aegaeon.types import TokenEvent


class Told:
    """A generation that arrived at second 10, and gets tokens one by one."""

    def __init__(self):
        self.run, self.tokens, self.last_s = Run("m", 7, 10.0), 0, 10.0

    def token(self, at_s, waited=None, instance="i"):
        if waited is not None:
            event = TokenEvent("r", 0, self.tokens, (1,), instance, waited=waited)
            self.run.heard(event, self.last_s, self.tokens, at_s)
        if not self.tokens:
            self.run.first_s = at_s
        self.tokens, self.last_s = self.tokens + 1, at_s

    def phases(self):
        run = self.run
        run.tokens, run.last_s, run.end_s = self.tokens, self.last_s, self.last_s
        return [tuple(phase) for phase in run.phases()]


def test_a_cold_request_queues_loads_switches_prefills_and_decodes():
    told = Told()
    told.token(20.0, Waited(3.0, 5.0, 1, 0.0, 4.0))
    told.token(21.0)
    told.token(22.0, Waited(3.0, 5.0, 1, 0.0, 4.0))
    assert told.phases() == [
        ("queue", 10.0, 13.0, "i", 0),
        ("load", 13.0, 17.0, "i", 0),
        ("switch", 17.0, 18.0, "i", 0),
        ("prefill", 18.0, 20.0, "i", 1),
        ("decode", 20.0, 22.0, "i", 2),
    ]


def test_a_pre_empted_request_has_a_decode_of_each_turn():
    told = Told()
    told.token(11.0, Waited(0.5, 0.0, 0, 0.0))
    told.token(12.0)
    told.token(20.0, Waited(0.5, 2.0, 1, 5.0))
    told.token(21.0)
    told.token(25.0, Waited(0.5, 3.0, 2, 7.0, 1.0), instance="j")
    assert told.phases() == [
        ("queue", 10.0, 10.5, "i", 0),
        ("prefill", 10.5, 11.0, "i", 1),
        ("decode", 11.0, 12.0, "i", 1),
        ("preempted", 12.0, 17.0, "i", 0),
        ("switch", 17.0, 19.0, "i", 0),
        ("decode", 19.0, 21.0, "i", 2),
        ("preempted", 21.0, 23.0, "j", 0),
        ("load", 23.0, 24.0, "j", 0),
        ("decode", 24.0, 25.0, "j", 1),
    ]
    assert told.run.instances == ["i", "j"]


def test_a_request_without_tokens_has_waited_in_the_queue():
    run = Run("m", 7, 10.0)
    run.end_s = 12.0
    assert [tuple(phase) for phase in run.phases()] == [("queue", 10.0, 12.0, "", 0)]


seconds = st.floats(0, 5, allow_nan=False)


@given(st.lists(st.tuples(seconds, seconds, seconds, seconds, st.booleans()), min_size=1))
def test_phases_follow_one_another_and_count_each_token_once(steps):
    told, waited, at_s = Told(), Waited(), 10.0
    for number, (queue_s, switch_s, preempted_s, step_s, is_told) in enumerate(steps):
        if number == 0 or is_told:
            first_s = 0.0 if number else queue_s
            waited = Waited(
                waited.queue_s + first_s,
                waited.switch_s + switch_s,
                waited.switches + 1,
                waited.preempted_s + preempted_s,
                waited.load_s + switch_s / 2,
            )
            at_s += first_s + switch_s + preempted_s + step_s
            told.token(at_s, waited)
        else:
            at_s += step_s
            told.token(at_s)
    told.phases()
    phases = told.run.phases()
    assert sum(phase.tokens for phase in phases) == len(steps)
    edges = [edge for phase in phases for edge in (phase.start_s, phase.end_s)]
    assert edges == sorted(edges) and edges[0] >= 10.0 and edges[-1] <= at_s
    for name, spent_s in (("queue", waited.queue_s), ("preempted", waited.preempted_s)):
        found_s = sum(phase.end_s - phase.start_s for phase in phases if phase.name == name)
        assert abs(found_s - spent_s) < 1e-6 * (1 + at_s)


def test_marks_and_runs_are_bounded():
    told = Told()
    for number in range(3 * MAX_MARKS):
        told.token(11.0 + number, Waited(0.0, 0.1 * number, number, 0.0))
    assert len(told.run.marks) == MAX_MARKS
    assert sum(phase[4] for phase in told.phases()) == told.tokens
    trace = Trace("POST", "/v1/completions", "", "")
    runs = [trace.run("m", 1, 0.0) for _ in range(MAX_RUNS + 3)]
    assert runs.count(None) == trace.left_out == 3


def test_what_was_asked_has_no_text_of_the_client():
    secret = "a secret of the client"
    chat = parse_chat(
        b'{"model": "m", "messages": [{"role": "user", "content": "%s"}], "stop": "%s", "n": 2,'
        b'"user": "%s", "metadata": {"k": "%s"}, "temperature": 0.5, "seed": 3, "stream": true,'
        b'"max_completion_tokens": 9, "max_tokens": 5, "response_format": {"type": "json_object"}}'
        % ((secret.encode(),) * 4)
    )
    asked = asked_of(chat)
    assert secret not in repr(asked)
    assert asked == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "aegaeon",
        "gen_ai.request.model": "m",
        "gen_ai.request.stream": True,
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 3,
        "gen_ai.request.choice.count": 2,
        "gen_ai.output.type": "json",
    }
    text = asked_of(parse_completion(b'{"model": "m", "prompt": "x"}'))
    assert text["gen_ai.operation.name"] == "text_completion" and len(text) == 3
