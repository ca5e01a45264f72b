"""Token ids to text: torn characters, stop strings, and equality with the decode at once."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from aegaeon.proxy.detokenize import (
    ByteLevelDetokenizer,
    ByteLevelVocabulary,
    StopMatcher,
    WindowDetokenizer,
    token_name_bytes,
)
from aegaeon.proxy.vocabulary import Vocabulary, tokens_of

TEXT = "Grüße, 世界! 👩‍👩‍👧 naïve — 12 345\n\ttab <tool> end"


@pytest.fixture(scope="module")
def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat " * 3, "Grüße 世界"], trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken("ä b", special=False)])
    return tokenizer


@pytest.fixture(scope="module")
def byte_fallback():
    """A vocabulary in the manner of SentencePiece: a metaspace, and bytes for what is missing."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁the", "▁c", "a", "t", "▁dog", "s", "é", "!"]
    tokenizer = Tokenizer(
        models.BPE({piece: at for at, piece in enumerate(pieces)}, [], byte_fallback=True)
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def seen(tokenizer):
    return Vocabulary(tokens_of(tokenizer, json.dumps(json.loads(tokenizer.to_str())["decoder"])))


def joined(detokenizer, ids):
    return "".join(detokenizer.push(token) for token in ids) + detokenizer.finish()


def test_a_character_is_never_torn(byte_level):
    detokenizer = ByteLevelDetokenizer(ByteLevelVocabulary(seen(byte_level)))
    pieces = [detokenizer.push(token) for token in byte_level.encode(TEXT).ids]
    assert "".join(pieces) == TEXT
    assert all("\ufffd" not in piece for piece in pieces)


@settings(max_examples=300)
@given(ids=st.lists(st.integers(0, 310), max_size=40))
def test_byte_level_pieces_join_to_the_full_decode(byte_level, ids):
    detokenizer = ByteLevelDetokenizer(ByteLevelVocabulary(seen(byte_level)))
    assert joined(detokenizer, ids) == byte_level.decode(ids, skip_special_tokens=True)


@settings(max_examples=300)
@given(ids=st.lists(st.integers(0, 272), max_size=40))
def test_window_pieces_join_to_the_full_decode(byte_fallback, ids):
    detokenizer = WindowDetokenizer(seen(byte_fallback))
    assert joined(detokenizer, ids) == byte_fallback.decode(ids, skip_special_tokens=True)


def test_window_pieces_come_as_soon_as_they_are_certain(byte_fallback):
    detokenizer = WindowDetokenizer(seen(byte_fallback))
    euro = [byte_fallback.token_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    exclamation = byte_fallback.token_to_id("!")
    the = byte_fallback.token_to_id("▁the")
    pieces = [detokenizer.push(token) for token in [the, the, *euro, exclamation]]
    assert pieces == ["the", " the", "", "", "", "€!"]


def test_noise_is_not_held_for_ever(byte_fallback):
    detokenizer = WindowDetokenizer(seen(byte_fallback))
    broken = byte_fallback.token_to_id("<0xFF>")
    assert any(detokenizer.push(broken) for _ in range(300))


def test_a_stop_string_is_found_across_pieces():
    matcher = StopMatcher(("</answer>",))
    assert matcher.push("yes</an") == ("yes", False)
    assert matcher.push("swer") == ("", False)
    assert matcher.push("> more") == ("", True)


def test_a_prefix_that_comes_to_nothing_is_given_out():
    matcher = StopMatcher(("STOP",))
    assert matcher.push("a ST") == ("a ", False)
    assert matcher.push("ART ST") == ("START ", False)
    assert matcher.finish() == "ST"


def test_the_earliest_stop_string_wins():
    assert StopMatcher(("later", "now")).push("now or later") == ("", True)


@settings(max_examples=300)
@given(
    pieces=st.lists(st.text("ab\n", max_size=4), max_size=12),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=4),
)
def test_streamed_text_ends_where_the_first_stop_string_begins(pieces, stops):
    matcher = StopMatcher(tuple(stops))
    sent, is_stopped = "", False
    for piece in pieces:
        text, is_stopped = matcher.push(piece)
        sent += text
        if is_stopped:
            break
    if not is_stopped:
        sent += matcher.finish()
    # A stop string is seen when it is complete, so only what had come by then counts.
    whole = "".join(pieces)
    ends = [whole.find(stop) for stop in stops if stop in whole]
    assert is_stopped == bool(ends)
    assert whole.startswith(sent)
    assert all(stop not in sent for stop in stops)
    if not ends:
        assert sent == whole


def test_sentencepiece_tokens_are_named_by_their_bytes():
    names = {"\u2581the": 0, "<0xE2>": 1, "<s>": 2, "ü": 3}
    tokenizer = Tokenizer(models.BPE(vocab=names, merges=[]))
    found = [token_name_bytes(seen(tokenizer), token) for token in range(5)]
    assert found == [b" the", b"\xe2", b"<s>", "ü".encode(), b""]
