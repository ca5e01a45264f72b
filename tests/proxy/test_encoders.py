"""Tokenizers in processes of their own: the same ids and text, within a bound on memory."""

import os
import signal
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aegaeon.errors import CheckpointError, Overloaded
from aegaeon.proxy import encoders as made
from aegaeon.proxy.encoders import Encoders, LocalEncoder, digest_of
from tests.support.tokenizer_files import KINDS, byte_level, write

TEXTS = ("", "hello world again", "Grüße, 世界! <tool>ä b<|end|> the dogs", "x" * 5000)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: write(root / name, make()) / "tokenizer.json" for name, make in KINDS.items()}


@pytest.fixture
def encoders(monkeypatch):
    monkeypatch.setattr(made, "SMALL_BYTES", 0)
    encoders = Encoders(10**10)
    yield encoders
    encoders.close()


def opened(encoders, file):
    return encoders.open(file, digest_of(file))


def pids(encoders):
    return [one._process.pid for one in encoders._processes.values()]


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 400), max_size=30), is_plain=st.booleans())
def test_text_of_tokens_is_the_tokenizers_own(files, name, ids, is_plain):
    tokenizer, here = KINDS[name](), LocalEncoder(files[name]).decoding.vocabulary
    decode, theirs = here.decode, tokenizer.decode(ids, skip_special_tokens=is_plain)
    assert decode(ids, skip_special_tokens=is_plain) == theirs
    assert [here.id_to_token(one) for one in ids] == [tokenizer.id_to_token(one) for one in ids]
    for token in (*tokenizer.get_vocab(), "<nothing>", "nd|>"):
        assert here.token_to_id(token) == tokenizer.token_to_id(token)
    assert here.longest_chars == max(map(len, tokenizer.get_vocab()))


@pytest.mark.parametrize("name", KINDS)
def test_a_process_makes_the_same_ids_and_text(encoders, files, name):
    there, here = opened(encoders, files[name]), LocalEncoder(files[name])
    for text in TEXTS:
        for is_whole in (False, True):
            ids = there.encode(text, is_whole)
            assert ids == here.encode(text, is_whole)
            decode = there.decoding.vocabulary.decode
            assert decode(ids) == here.decoding.vocabulary.decode(ids)
    assert there.decoding.vocabulary.own_end == here.decoding.vocabulary.own_end


def test_one_content_is_one_process_whoever_asks(encoders, files, tmp_path):
    copy = write(tmp_path, byte_level()) / "tokenizer.json"
    one, other = opened(encoders, files["byte_level"]), opened(encoders, copy)
    assert len(pids(encoders)) == 1
    assert one.decoding is other.decoding


def test_many_threads_are_answered_each_its_own(encoders, files):
    there, here = opened(encoders, files["byte_level"]), LocalEncoder(files["byte_level"])
    wrong = []

    def ask(number):
        text = f"text {number} " * 50
        for _ in range(20):
            if there.encode(text, False) != here.encode(text, False):
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong


def test_one_that_was_killed_is_replaced(encoders, files):
    there = opened(encoders, files["words"])
    ids = there.encode("hello world", False)
    (pid,) = pids(encoders)
    os.kill(pid, signal.SIGKILL)
    assert there.encode("hello world", False) == ids
    assert pids(encoders) != [pid]


def test_the_least_recently_used_ends_for_another(monkeypatch, files):
    monkeypatch.setattr(made, "SMALL_BYTES", 0)
    encoders = Encoders(1)  # room for none, so one at a time
    try:
        first = opened(encoders, files["words"])
        ids = first.encode("hello world", False)
        (pid,) = pids(encoders)
        opened(encoders, files["metaspace"])
        assert len(pids(encoders)) == 1 and pids(encoders) != [pid]
        assert not encoders.has(digest_of(files["words"])) and not encoders.has_room()
        assert first.encode("hello world", False) == ids
        assert encoders.has(digest_of(files["words"])) and len(pids(encoders)) == 1
    finally:
        encoders.close()
    with pytest.raises(Overloaded, match="stopping"):
        first.encode("hello", False)
    assert not pids(encoders)


def test_what_cannot_be_read_says_so(encoders, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text('{"model": 1}')
    with pytest.raises(CheckpointError, match="fetch or import"):
        opened(encoders, file)
    with pytest.raises(CheckpointError, match="cannot read"):
        digest_of(tmp_path / "none.json")
    assert not pids(encoders)
