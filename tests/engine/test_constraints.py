"""Grammars: every answer follows its schema, and is the same in any company and after any loss."""

import json
import random
import time
from concurrent.futures import wait

import msgspec
import pytest
from llguidance import LLMatcher

from aegaeon.engine import grammar_client
from aegaeon.engine.constraints import MAX_LOSSES, Constraint
from aegaeon.engine.grammar_client import GrammarHost
from aegaeon.errors import AegaeonError, InvalidRequest, Overloaded
from aegaeon.proxy.failures import as_api_error
from aegaeon.sampling import SamplingParams
from aegaeon.scheduler.cost import Costs, ModelCost
from aegaeon.scheduler.ledger import Limits
from aegaeon.scheduler.policies import POLICIES, Fleet
from aegaeon.scheduler.residency import Residency
from aegaeon.types import Idle, Loaded, Prefill, Switch, Switched
from tests.engine.test_checkpoints import DEVICES, SETTINGS, opened
from tests.support.decoder import load_in_thread, make_request
from tests.support.polling import eventually
from tests.support.runner import Runner

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bc"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
COMPACT = {"whitespace_flexible": False}
GRAMMAR = LLMatcher.grammar_from_json_schema(PERSON, overrides=COMPACT)
# Its lexer has more states than are allowed once it has seen some of a string.
TOO_MUCH = LLMatcher.grammar_from_json_schema(
    {"type": "string", "pattern": "^(([a-z]{1,100}){1,100}){1,100}$"}
)


@pytest.fixture
def host():
    with_process = GrammarHost()
    yield with_process
    with_process.close()


def constrained(spec, text, name="r", grammar=GRAMMAR, **changes):
    params = {"temperature": 1.0, "seed": 3, **changes.pop("params", {})}
    values = {
        "model": spec.id,
        "sampling": SamplingParams(grammar=grammar, **params),
        "max_tokens": 300,
        "stop_token_ids": text.stop_token_ids,
    }
    return make_request(name, [5, 6, 7, 8], **{**values, **changes})


def ids_of(mask) -> set[int]:
    return {32 * word + bit for word, bits in enumerate(mask.tolist()) for bit in range(32)
            if bits >> bit & 1}  # fmt: skip


def follow(constraint, timeout_s=30.0):
    eventually(lambda: constraint.is_ready, timeout_s)
    return ids_of(constraint.allowed())


def run(spec, *requests, choose=None, **settings):
    with opened(msgspec.structs.replace(SETTINGS, **settings), (spec,)) as engine:
        load_in_thread(engine, spec.id)
        runner = Runner(engine)
        runner.submit(*requests)
        runner.finish(choose)
        return runner


def test_only_what_follows_the_grammar_may_come(host, spec, text):
    made = []
    constraint = Constraint(host, spec, constrained(spec, text), made)
    answer = '{"name":"x","age":7,"tags":[]}'
    for token in text.encode(answer):
        assert token in follow(constraint)
        made.append(token)
        constraint.push(token)
    assert follow(constraint) == set(text.stop_token_ids)


def test_a_sequence_that_goes_on_elsewhere_may_have_what_it_might_have_had(host, spec, text):
    made = []
    first = Constraint(host, spec, constrained(spec, text), made)
    for token in text.encode('{"name":"x'):
        follow(first)
        made.append(token)
        first.push(token)
    second = Constraint(host, spec, constrained(spec, text), list(made))
    assert follow(second) == follow(first)


def test_a_host_that_dies_is_replaced_and_its_sequences_go_on(host, spec, text):
    made = list(text.encode('{"name":"x'))
    idle, asking = (Constraint(host, spec, constrained(spec, text), made) for _ in range(2))
    expected = follow(idle)
    follow(asking)
    host._process.popen.kill()
    eventually(lambda: host.life == 1, 10)
    token = text.encode("y")[0]
    assert token in expected
    made.append(token)
    for constraint in (idle, asking):
        constraint.push(token)
        assert follow(constraint)
    assert follow(idle) == follow(asking)


def test_more_than_a_pipe_holds_goes_to_the_host_and_back(host, spec, text):
    """Long grammars go there while masks come back, more of either than pipes have room for."""
    long = {**PERSON, "description": "x" * 60_000}
    grammar = LLMatcher.grammar_from_json_schema(long, overrides=COMPACT)
    wide = msgspec.structs.replace(spec, vocab_tokens=200_000)
    request = constrained(spec, text, grammar=grammar)
    first = [Constraint(host, wide, request, []) for _ in range(30)]
    token = text.encode("{")[0]
    for constraint in first:
        assert token in follow(constraint)
    second = []
    for constraint in first:
        second.append(Constraint(host, wide, request, []))
        constraint.push(token)
    for constraint in (*first, *second):
        assert follow(constraint)


def test_a_sequence_whose_host_dies_again_and_again_before_it_answers_ends(host, spec, text):
    constraint = Constraint(host, spec, constrained(spec, text), [])
    for life in range(MAX_LOSSES):
        assert not constraint.is_ready
        host._process.popen.kill()
        eventually(lambda life=life: host.life == life + 1, 10)
        eventually(constraint.answer.done, 10)
    assert constraint.is_ready
    with pytest.raises(Overloaded, match="again"):
        constraint.allowed()


def test_a_token_that_no_mask_allowed_is_our_mistake_and_not_the_clients(host, spec, text):
    constraint = Constraint(host, spec, constrained(spec, text), [])
    token = text.encode("x")[0]
    assert token not in follow(constraint)
    constraint.push(token)
    wait([constraint.answer], 30)
    with pytest.raises(AegaeonError, match="has failed") as failure:
        constraint.allowed()
    assert as_api_error(failure.value).status == 500


@pytest.mark.parametrize("files", [{}, {"tokenizer.json": "{}"}])
def test_a_vocabulary_that_cannot_be_read_is_not_the_clients_mistake(
    host, spec, text, files, tmp_path
):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    broken = msgspec.structs.replace(spec, path=str(tmp_path))
    constraint = Constraint(host, broken, constrained(spec, text), [])
    wait([constraint.answer], 30)
    with pytest.raises(AegaeonError, match="cannot be read") as failure:
        constraint.allowed()
    assert failure.value.code == "internal_error"


@pytest.mark.parametrize("grammar", ["no grammar", LLMatcher.grammar_from_json_schema({"if": 1})])
def test_what_is_no_grammar_ends_its_own_sequence(host, spec, text, grammar):
    wrong = Constraint(host, spec, constrained(spec, text, grammar=grammar), [])
    right = Constraint(host, spec, constrained(spec, text), [])
    assert follow(right)
    wait([wrong.answer], 30)
    with pytest.raises(InvalidRequest, match="cannot go on"):
        wrong.allowed()


@pytest.mark.parametrize("seed", range(4))
def test_answers_follow_their_schema(spec, text, seed):
    request = constrained(spec, text, params={"seed": seed})
    runner = run(spec, request)
    assert runner.reasons == {"r": "stop"}
    answer = json.loads(text.decode(tuple(runner.tokens["r"])))
    assert set(answer) == {"name", "age", "tags"}
    assert isinstance(answer["name"], str) and 0 <= answer["age"] <= 150
    assert set(answer["tags"]) <= {"a", "bc"}


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_are_the_same_in_any_company_and_when_they_go_on_elsewhere(spec, text, device):
    kinds = [{"seed": 1}, {"temperature": 0.0, "logprobs": 1}, {"presence_penalty": 0.5}]
    requests = [constrained(spec, text, f"r{at}", params=params) for at, params in enumerate(kinds)]
    alone = {one.id: run(spec, one).tokens[one.id] for one in requests}
    mates = [make_request(f"m{at}", [9, 8, 7, at], model=spec.id) for at in range(4)]
    together = run(spec, *requests, *mates, choose=random.Random(2), **DEVICES[device])
    assert {name: together.tokens[name] for name in alone} == alone
    known = alone["r0"]
    rest = constrained(
        spec, text, "r0", params=kinds[0], generated_token_ids=tuple(known[:5]), attempt=1
    )
    assert run(spec, rest).tokens["r0"] == known[5:]


def test_the_free_ones_do_not_wait_for_one_whose_grammar_is_late(spec, text, monkeypatch):
    """Nobody answers: the constrained sequence has no token, its mates have theirs at once."""
    monkeypatch.setattr(grammar_client, "write_frame", lambda pipe, question: None)
    with opened(SETTINGS, (spec,)) as engine:
        load_in_thread(engine, spec.id)
        runner = Runner(engine)
        runner.submit(constrained(spec, text, "late"), make_request("free", [5], model=spec.id))
        engine.execute(Switch(spec.id))
        began = time.monotonic()
        for _ in range(3):
            runner.act(Prefill(spec.id, ("late", "free")))
        assert len(runner.tokens["free"]) == 3 and runner.tokens["late"] == []
        runner.act(Prefill(spec.id, ("late",)))
        assert time.monotonic() - began < 60
        assert not runner.failures


@pytest.mark.parametrize("policy", POLICIES)
def test_who_lost_its_kv_goes_on_beside_one_whose_grammar_is_late(spec, text, monkeypatch, policy):
    monkeypatch.setattr(grammar_client, "write_frame", lambda pipe, question: None)
    cost = ModelCost(1.0, 0.0, 512, (0.0, 0.0, 0.02), (0.0, 0.0, 0.01))
    costs = Costs(1.0, 1.0, {spec.id: cost}, ())
    fleet = Fleet(limits=Limits(prefill_requests=4))
    scheduler = POLICIES[policy].scheduler(Residency({spec.id: 1}, 1), costs, fleet, "colocated")
    other = make_request("other", [5] * 9, model=spec.id, max_tokens=50)
    with opened(SETTINGS, (spec,)) as engine:
        load_in_thread(engine, spec.id)
        for request in (other, constrained(spec, text, "late")):
            engine.submit(request)
            scheduler.submit(request, 0.0)
        assert scheduler.next_load(0.1).model == spec.id
        scheduler.complete(Loaded(spec.id, 1, 0.1), 0.2)
        assert scheduler.next_action(0.2) == Switch(spec.id)
        engine.execute(Switch(spec.id))
        scheduler.complete(Switched(spec.id, 0.0), 0.2)
        for at in range(6):
            action = scheduler.next_action(1.0 + at)
            assert not isinstance(action, Idle)
            outcome = engine.execute(action)
            if "late" in action.requests:
                gone = {"tokens": (), "preempted": ("other",), "shortage": "no blocks"}
                outcome = msgspec.structs.replace(outcome, **gone)
            scheduler.complete(outcome, 1.1 + at)


def test_a_grammar_that_takes_too_much_fails_its_own_request_only(spec, text):
    late = [constrained(spec, text, f"bad{at}", TOO_MUCH, params={"seed": at}) for at in range(3)]
    runner = run(spec, *late, constrained(spec, text, "good"))
    assert runner.reasons["good"] == "stop"
    assert set(runner.failures.values()) <= {"invalid_value"} and runner.failures
    assert runner.engine.usage().kv_bytes == 0


def test_a_host_that_cannot_be_started_fails_who_needs_it_only(spec, text, monkeypatch):
    def cannot(*args, **named):
        raise OSError("no more processes")

    monkeypatch.setattr(grammar_client.subprocess, "Popen", cannot)
    runner = run(spec, constrained(spec, text, "held"), make_request("free", [5], model=spec.id))
    assert runner.failures == {"held": "overloaded"}
    assert len(runner.tokens["free"]) == 12
