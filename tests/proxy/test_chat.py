"""Chat templates: the same prompts and ids as transformers, and nothing beyond the sandbox."""

import copy
import json
from functools import lru_cache
from pathlib import Path

import msgspec
import pytest
from transformers import AutoTokenizer

from aegaeon.errors import CheckpointError, InvalidRequest
from aegaeon.proxy.chat import ChatTemplate, messages_for_template
from aegaeon.proxy.openai import Message
from aegaeon.proxy.tokenizer import TextModel
from tests.support.chat_templates import CONVERSATIONS, TEMPLATES
from tests.support.proxy_server import write_text_model
from tests.support.smollm2 import smollm2_directory

QWEN3_DIR = Path(__file__).parents[2] / "models" / ".qwen3-tokenizer"


def for_transformers(messages):
    """What its users pass: arguments as objects, no content as empty text."""
    messages = copy.deepcopy(messages)
    for message in messages:
        message["content"] = message["content"] or ""
        for call in message.get("tool_calls") or []:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return messages


@lru_cache(maxsize=2)
def tokenizers_of(directory):
    """Ours and that of transformers."""
    return TextModel(str(directory)), AutoTokenizer.from_pretrained(directory)


def assert_same_prompt(directory, conversation, **extras):
    messages, tools = CONVERSATIONS[conversation]
    ours = messages_for_template(msgspec.convert(messages, list[Message]))
    model, reference = tokenizers_of(directory)
    options = {"tools": tools, "add_generation_prompt": True, **extras}
    text = reference.apply_chat_template(for_transformers(messages), tokenize=False, **options)
    assert model.render_chat(ours, tools, extras) == text
    encoded = reference.apply_chat_template(for_transformers(messages), **options)
    assert model.encode_chat(ours, tools, extras) == tuple(encoded["input_ids"])


@pytest.fixture(scope="module", params=TEMPLATES)
def text_model(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    return write_text_model(directory, TEMPLATES[request.param])


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_prompts_and_ids_equal_those_of_transformers(text_model, conversation):
    assert_same_prompt(text_model, conversation)


def test_a_clients_extra_variables_reach_the_template(tmp_path):
    directory = write_text_model(tmp_path, TEMPLATES["marks"])
    assert_same_prompt(directory, "user", enable_thinking=False)


@pytest.mark.parametrize("conversation", ["user", "system and user", "turns", "odd text"])
def test_smollm2_prompts_equal_those_of_transformers(conversation):
    assert_same_prompt(smollm2_directory(), conversation)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_qwen3_prompts_equal_those_of_transformers(conversation):
    if not (QWEN3_DIR / "tokenizer.json").is_file():
        pytest.skip("needs Qwen3's tokenizer; run `make qwen3-tokenizer` once")
    assert_same_prompt(QWEN3_DIR, conversation)


def test_text_parts_are_joined_and_developers_are_the_system():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": parts}]
    plain = messages_for_template(msgspec.convert(messages, list[Message]))
    assert plain == [{"role": "system", "content": "a\nb"}]


def test_arguments_that_are_not_json_are_refused():
    call = {"function": {"name": "f", "arguments": "{"}}
    messages = [{"role": "assistant", "tool_calls": [call]}]
    with pytest.raises(InvalidRequest, match="not JSON"):
        messages_for_template(msgspec.convert(messages, list[Message]))


def test_the_default_of_named_templates_is_used(tmp_path):
    named = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "plain"}]
    directory = write_text_model(tmp_path, named)
    assert TextModel(str(directory)).render_chat([]) == "plain"


def test_a_template_in_a_file_of_its_own_wins(tmp_path):
    directory = write_text_model(tmp_path, "from the config")
    (directory / "chat_template.jinja").write_text("from the file")
    assert TextModel(str(directory)).render_chat([]) == "from the file"


def test_a_model_without_a_template_says_what_to_do(tmp_path):
    model = TextModel(str(write_text_model(tmp_path, chat_template=None)))
    with pytest.raises(InvalidRequest, match="/v1/completions"):
        model.encode_chat([{"role": "user", "content": "hi"}])


def test_special_tokens_are_text_in_templates(tmp_path):
    bos = {"content": "<|endoftext|>", "special": True, "__type": "AddedToken"}
    directory = write_text_model(tmp_path, "{{ bos_token }}{{ eos_token }}", bos_token=bos)
    assert TextModel(str(directory)).render_chat([]) == "<|endoftext|><|im_end|>"


def test_a_template_that_cannot_be_compiled_is_an_error_of_the_checkpoint():
    with pytest.raises(CheckpointError, match="cannot be compiled"):
        ChatTemplate("{% for %}", {})


def test_a_template_may_refuse_a_conversation():
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        template.render([])


def test_a_clients_variables_do_not_replace_ours():
    template = ChatTemplate("{{ messages | length }}{{ add_generation_prompt }}", {})
    extras = {"messages": [1, 2], "add_generation_prompt": False}
    assert template.render([{}], None, extras) == "1True"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ strftime_now.__func__.__globals__ }}",
        "{{ namespace(__init__=1).x }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ dict.__call__.__globals__ }}",
        "{{ '{0.__class__.__mro__}'.format('') }}{{ ''.__class__.mro() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{{ self.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{{ lipsum.__globals__['os'] }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(source):
    messages = [{"role": "user", "content": "hi"}]
    template = ChatTemplate(source, {})
    with pytest.raises(InvalidRequest):
        template.render(messages)
    assert messages == [{"role": "user", "content": "hi"}]
