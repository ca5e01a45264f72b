"""Templates of strangers: bounded in time, memory and output, and rendered as ever otherwise."""

import json
import os
import signal
import threading
import time

import msgspec
import pytest

from aegaeon.errors import CheckpointError, InvalidRequest, Overloaded
from aegaeon.proxy import bounded
from aegaeon.proxy.chat import MAX_SOURCE_CHARS, ChatTemplate, messages_for_template, read_template
from aegaeon.proxy.openai import Message
from aegaeon.proxy.rendering import MAX_PROCESSES, Renderer
from tests.support.chat_templates import CONVERSATIONS, TEMPLATES

HELLO = [{"role": "user", "content": "hello"}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def renderer():
    renderer = Renderer(cpu_s=0.5, memory_bytes=512 << 20)
    yield renderer
    renderer.close()


def is_gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_prompts_are_those_of_the_template_in_this_process(renderer, name, conversation):
    messages, tools = CONVERSATIONS[conversation]
    ours = messages_for_template(msgspec.convert(messages, list[Message]))
    extras = {"enable_thinking": False, "bos_token": "replaced"}
    here = ChatTemplate(TEMPLATES[name], TOKENS)
    there = renderer.template(TEMPLATES[name], TOKENS)
    try:
        expected = here.render(ours, tools, extras)
    except InvalidRequest as error:
        with pytest.raises(InvalidRequest) as caught:
            there.render(ours, tools, extras)
        assert str(caught.value) == str(error)
        return
    assert there.render(ours, tools, extras) == expected
    assert there.render(ours, tools, extras) == expected  # and compiled before, too


HOSTILE = {
    "a long loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "too long a loop": "{% for i in range(10**9) %}x{% endfor %}",
    "a long text": "{{ 'a' * 10**10 }}",
    "a long text at compile time": "{% set x = 'a' * 10**10 %}hi",
    "a long list": "{% set x = [1] * 10**10 %}{{ x | length }}",
    "a large number": "{{ 9 ** (9 ** 9) }}",
    "a wide field": "{{ '%10000000000d' % 1 }}",
    "a wide format": "{{ '{:>10000000000}'.format(1) }}",
    "padding": "{{ 'x' | center(10**10) }}",
    "indents": "{{ [[1]] | tojson(indent=10**9) }}",
    "doubling": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x | length }}",
    "sharing": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "much output": "{% for i in range(99999) %}{{ 'abcdefgh' * 1000 }}{% endfor %}",
    "half a character": "{{ '\\ud800' }}",
    "out of the sandbox": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_costs_a_bounded_time_and_an_error(renderer, name):
    template = renderer.template(HOSTILE[name], {})
    began_s = time.monotonic()
    with pytest.raises((InvalidRequest, CheckpointError)) as caught:
        template.render(HELLO)
    assert time.monotonic() - began_s < 20
    assert len(str(caught.value)) < 1000 and "Traceback" not in str(caught.value)
    # Whoever comes next is served as ever.
    assert renderer.template("{{ messages[0].content }}", {}).render(HELLO) == "hello"


def test_a_template_that_cannot_be_compiled_is_the_models_fault(renderer):
    template = renderer.template("{% for %}", {})
    for _ in range(2):
        with pytest.raises(CheckpointError, match="cannot be compiled"):
            template.render(HELLO)


def test_what_no_template_takes_is_refused(renderer):
    template = renderer.template("{{ x }}", {})
    with pytest.raises(InvalidRequest):
        template.render(HELLO, None, {"x": 10**30})
    assert template.render(HELLO, None, {"x": 2**62}) == str(2**62)


def test_one_that_hangs_holds_up_nobody_else():
    renderer = Renderer(cpu_s=1.0)
    slow = renderer.template(HOSTILE["a long loop"], {})
    quick = renderer.template("{{ messages[0].content }}", {})
    quick.render(HELLO)

    def hang():
        with pytest.raises(InvalidRequest, match="takes too long"):
            slow.render(HELLO)

    threads = [threading.Thread(target=hang) for _ in range(MAX_PROCESSES - 1)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(0.1)
        assert quick.render(HELLO) == "hello"
        assert any(thread.is_alive() for thread in threads)
    finally:
        for thread in threads:
            thread.join(60)
        renderer.close()


def test_a_process_that_is_killed_is_replaced_and_closing_leaves_none():
    renderer = Renderer()
    template = renderer.template("{{ messages[0].content }}", {})
    assert template.render(HELLO) == "hello"
    first = renderer._processes._idle.queue[0].process
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert template.render(HELLO) == "hello"
    second = renderer._processes._idle.queue[0].process.pid
    assert second != first.pid
    renderer.close()
    assert is_gone(second)
    with pytest.raises(Overloaded, match="stopping"):
        template.render(HELLO)
    renderer.close()


def test_one_that_is_lost_at_work_is_nobodys_fault(monkeypatch):
    monkeypatch.setattr(bounded, "ANSWER_S", 0.5)
    renderer = Renderer()
    template = renderer.template("{{ messages[0].content }}", {})
    try:
        assert template.render(HELLO) == "hello"
        first = renderer._processes._idle.queue[0].process
        first.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(bounded, "ANSWER_S", 60.0)
        assert template.render(HELLO) == "hello"  # by another one
        assert is_gone(first.pid)

        monkeypatch.setattr(bounded.BoundedProcess, "ask", lambda *_: None)
        with pytest.raises(Overloaded, match="ask again"):
            template.render(HELLO)
    finally:
        renderer.close()


def test_a_template_of_megabytes_is_none(tmp_path):
    huge = "x" * (MAX_SOURCE_CHARS + 1)
    with pytest.raises(CheckpointError, match="are allowed"):
        read_template(tmp_path, {"chat_template": huge})
    (tmp_path / "chat_template.jinja").write_text(huge)
    with pytest.raises(CheckpointError, match="are allowed"):
        read_template(tmp_path, json.loads("{}"))
