"""One heavy schema costs its own sequence an error, and the others nothing but time."""

import io
import os
import signal
import time
from concurrent.futures import Future

import msgspec
import pytest
from llguidance import LLMatcher

from aegaeon.engine import grammar_client, grammar_host
from aegaeon.engine.constraints import MAX_LOSSES, Constraint
from aegaeon.engine.grammar_client import BUILD_S, SILENT_S, GrammarHost, _Asked
from aegaeon.engine.grammar_host import Began, Begin, Crowded, Host, read_frame
from aegaeon.errors import InvalidRequest, Overloaded
from aegaeon.memory.budget import GRAMMAR_VOCABULARIES, grammar_host_bytes
from tests.engine.test_constraints import constrained, follow
from tests.support.polling import eventually


def grammar_of(schema):
    return LLMatcher.grammar_from_json_schema(schema)


def slow(number=0):
    """Return a grammar that takes seconds to build, and hundreds of MB."""
    return grammar_of({"type": "integer", "multipleOf": 1_000_003 + 2 * number})


@pytest.fixture
def host():
    host = GrammarHost(cpu_s=0.3)
    yield host
    host.close()


def begin(host, spec, text, grammar=None, made=()):
    request = constrained(spec, text, **({} if grammar is None else {"grammar": grammar}))
    return Constraint(host, spec, request, list(made))


def refused(constraint):
    eventually(lambda: constraint.is_ready, 30)
    with pytest.raises(InvalidRequest, match="too much"):
        constraint.allowed()


def test_heavy_grammars_are_refused_and_others_go_on(host, spec, text):
    open_one = begin(host, spec, text)
    expected = follow(open_one)
    heavy = [begin(host, spec, text, slow(number)) for number in range(5)]
    behind = begin(host, spec, text)
    open_one.push(text.encode("{")[0])
    everybody = [open_one, behind, *heavy]
    eventually(lambda: sum(one.is_ready for one in everybody) == len(everybody), 60)
    assert follow(behind) == expected and follow(open_one)
    for one in heavy:
        refused(one)
    assert host.life == len(heavy)


def test_a_grammar_that_was_too_much_is_refused_at_once_from_then_on(host, spec, text):
    refused(begin(host, spec, text, slow()))
    assert host.life == 1
    refused(begin(host, spec, text, slow()))
    assert host.life == 1 and host._process is None


def test_memory_is_bounded(spec, text):
    host = GrammarHost(cpu_s=60.0, memory_bytes=300 << 20)
    try:
        other = begin(host, spec, text)
        expected = follow(other)
        refused(begin(host, spec, text, slow()))
        assert follow(begin(host, spec, text)) == expected
    finally:
        host.close()


def test_a_loss_is_forgotten_with_an_answer(host, spec, text):
    made = []
    constraint = Constraint(host, spec, constrained(spec, text), made)
    for token in text.encode('{"name":"abcd')[: MAX_LOSSES + 2]:
        assert token in follow(constraint)
        os.kill(host._process.popen.pid, signal.SIGSTOP)
        made.append(token)
        constraint.push(token)
        host._process.popen.kill()
        eventually(constraint.answer.done, 10)
    assert follow(constraint)
    assert host.life == MAX_LOSSES + 2


def test_asking_never_waits_for_the_process(host, spec, text, monkeypatch):
    first = begin(host, spec, text)
    follow(first)
    os.kill(host._process.popen.pid, signal.SIGSTOP)
    try:
        long = grammar_of({"type": "integer", "description": "x" * 60_000})
        began_s = time.monotonic()
        many = [begin(host, spec, text, long) for _ in range(20)]  # more than a pipe holds
        for one in many[:10]:
            one.close()
        assert time.monotonic() - began_s < 30
        monkeypatch.setattr(grammar_client, "MAX_UNSENT", 5)
        with pytest.raises(Overloaded, match="too many"):
            begin(host, spec, text).allowed()
    finally:
        os.kill(host._process.popen.pid, signal.SIGCONT)
    for one in many[10:]:
        assert follow(one)


def test_a_build_is_timed_from_its_beginning_and_not_while_others_are_built():
    host = GrammarHost()
    host._open = {1: _Asked(Future(), None), 2: _Asked(Future(), None)}
    assert host._is_stuck(SILENT_S + 1)
    host._building = Began(1, b""), 1000.0
    assert not host._is_stuck(1000.0 + BUILD_S - 1)
    assert host._is_stuck(1000.0 + BUILD_S + 1)
    host._on_answer(grammar_host.Refused(1, "no", is_ours=False))
    assert host._building is None and not host._is_stuck(time.monotonic())


def test_nothing_is_built_where_there_is_no_room(spec, text, monkeypatch):
    out = io.BytesIO()
    host = Host(out, cpu_s=1.0, memory_bytes=1 << 30)
    host._matchers[0] = None  # somebody's, who goes on
    monkeypatch.setattr(grammar_host, "_size_bytes", lambda: 1 << 30)
    host._begin(Begin(1, spec.path, spec.vocab_tokens, (), slow(), ()))
    out.seek(0)
    assert msgspec.msgpack.decode(read_frame(out), type=grammar_host.Answer) == Crowded(1)


def test_what_is_kept_is_bounded_by_bytes(spec, text, monkeypatch):
    sizes = iter(range(0, 100 << 30, 100 << 20))  # each look finds 100 MB more
    host = Host(io.BytesIO(), cpu_s=5.0, memory_bytes=1 << 30)
    name = (spec.path, spec.vocab_tokens, ())
    vocabulary = host._vocabulary(name)
    monkeypatch.setattr(grammar_host, "_size_bytes", lambda: next(sizes))
    for number in range(4):
        host._built((name, grammar_of({"type": "integer", "minimum": number})), vocabulary)
    assert len(host._grammars) == 2


def test_what_its_process_has_in_memory_is_told_and_near_what_is_set_aside(host, spec, text):
    assert host.resident_bytes() == 0
    one = begin(host, spec, text)
    eventually(lambda: one.is_ready, 30)
    aside_bytes = grammar_host_bytes((spec,))
    assert aside_bytes / 2 < host.resident_bytes() < aside_bytes
    host.close()
    assert host.resident_bytes() == 0


def test_as_many_vocabularies_are_set_aside_as_are_kept():
    assert GRAMMAR_VOCABULARIES == grammar_host.MAX_VOCABULARIES
