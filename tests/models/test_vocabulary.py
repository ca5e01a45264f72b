"""Vocabularies as grammars see them: masks of tokens that are text, and of no others."""

import json
from pathlib import Path

import pytest
from llguidance import LLMatcher

from aegaeon.models.vocabulary import read_vocabulary
from tests.support.checkpoints import IM_END, VOCAB_TOKENS, make_config, write_tokenizer

ADDED = ("<tool_call>", "</tool_call>", "<|python_tag|>")
PADDING = 4  # ids of logits without a token


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A tokenizer with tags as added tokens: text, all but the last."""
    directory = tmp_path_factory.mktemp("vocabulary")
    write_tokenizer(directory, make_config("llama"))
    file = directory / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    common = {"single_word": False, "lstrip": False, "rstrip": True, "normalized": False}
    first = 1 + max(
        *tokenizer["model"]["vocab"].values(), *(one["id"] for one in tokenizer["added_tokens"])
    )
    for at, name in enumerate(ADDED):
        special = name == "<|python_tag|>"
        token = {"id": first + at, "content": name, "special": special, **common}
        tokenizer["added_tokens"].append(token)
    file.write_text(json.dumps(tokenizer))
    return directory


@pytest.fixture(scope="module")
def ids(directory) -> dict[str, int]:
    added = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
    return {one["content"]: one["id"] for one in added}


@pytest.fixture(scope="module")
def vocabulary(directory, ids):
    return read_vocabulary(str(directory), max(ids.values()) + 1 + PADDING, (IM_END,))


def allowed(matcher) -> set[int]:
    mask = matcher.compute_bitmask()
    assert not matcher.is_error(), matcher.get_error()
    return {8 * at + bit for at, byte in enumerate(mask) for bit in range(8) if byte >> bit & 1}


def follow(vocabulary, lark: str) -> list[int]:
    """Take the highest token of each mask, to the end."""
    matcher = LLMatcher(vocabulary, LLMatcher.grammar_from_lark(lark), log_level=0)
    taken = []
    while not matcher.is_stopped():
        taken.append(max(allowed(matcher)))
        assert matcher.consume_token(taken[-1]), matcher.get_error()
    return taken


def test_a_tag_that_must_come_is_its_token(vocabulary, ids):
    taken = follow(vocabulary, r'start: "<tool_call>\n" "x" "</tool_call>"')
    assert taken[0] == ids["<tool_call>"] and ids["</tool_call>"] in taken
    assert vocabulary.decode_bytes(taken) == b"<tool_call>\nx</tool_call>"


@pytest.mark.parametrize("name", ["<|python_tag|>", "<|im_end|>", "<|im_start|>"])
def test_the_name_of_a_control_sign_in_a_schema_is_written_in_pieces(vocabulary, ids, name):
    taken = follow(vocabulary, f'start: "a{name}b"')
    assert vocabulary.decode_bytes(taken) == f"a{name}b".encode()
    assert ids[name] not in taken


def test_text_is_every_token_that_is_shown(vocabulary, ids):
    matcher = LLMatcher(vocabulary, LLMatcher.grammar_from_lark(r"start: /(.|\n)*/"), log_level=0)
    found = allowed(matcher)
    assert {ids["<tool_call>"], ids["</tool_call>"], IM_END} <= found  # the last ends it
    assert not found & {ids["<|python_tag|>"], ids["<|im_start|>"], ids["<|endoftext|>"]}
    assert max(found) < vocabulary.vocab_size - PADDING
    assert vocabulary.vocab_size > VOCAB_TOKENS


def test_a_vocabulary_wider_than_the_logits_is_refused(directory):
    with pytest.raises(ValueError, match="vocab size too small"):
        read_vocabulary(str(directory), VOCAB_TOKENS // 2, (IM_END,))
