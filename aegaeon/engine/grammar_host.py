"""The process that works out which tokens may come next: `python -m aegaeon.engine.grammar_host`.

A process of its own: reading a vocabulary holds the interpreter for a second, and a grammar that
takes too long can be ended with it. Frames on stdin and stdout; no torch.
"""

import os
import signal
import struct
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import IO

import msgspec
from llguidance import LLMatcher, LLTokenizer

from aegaeon.models.grammar import limits, plain
from aegaeon.models.vocabulary import read_vocabulary

# Kept for the next sequence: a vocabulary takes some 170 MB and two seconds to read.
MAX_VOCABULARIES = 4
MAX_GRAMMARS = 64
# What llguidance says of a token that no mask should have allowed. All else that ends a matcher is
# a grammar that takes more than its bounds.
NOT_ALLOWED = "satisfy the grammar"
LENGTH = struct.Struct("<I")

VocabularyKey = tuple[str, int, tuple[int, ...]]


class Begin(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A sequence under `key` follows `grammar`, `tokens` so far. Answered."""

    key: int
    directory: str
    vocab_tokens: int
    stop_token_ids: tuple[int, ...]
    grammar: str
    tokens: tuple[int, ...]


class Push(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The sequence has one more token. Answered."""

    key: int
    token_id: int


class End(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Forget the sequence."""

    key: int


class Allowed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Which tokens may come next: a bit for each, in 32-bit words."""

    key: int
    mask: bytes


class Refused(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The sequence cannot go on; `is_ours` where no other grammar would help."""

    key: int
    message: str
    is_ours: bool


Question = Begin | Push | End
Answer = Allowed | Refused


def write_frame(file: IO[bytes], message: Question | Answer) -> None:
    """Write one message."""
    record = msgspec.msgpack.encode(message)
    file.write(LENGTH.pack(len(record)) + record)
    file.flush()


def read_frame(file: IO[bytes]) -> bytes | None:
    """Return the next message's bytes, or None where there will be none."""
    head = file.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    record = file.read(LENGTH.unpack(head)[0])
    return record if len(record) == LENGTH.unpack(head)[0] else None


class Host:
    """Answers questions. New grammars are built on a thread beside, so that they delay no mask."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._turn = threading.Lock()  # to write
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="builder")
        self._matchers: dict[int, LLMatcher] = {}
        self._vocabularies: OrderedDict[VocabularyKey, LLTokenizer] = OrderedDict()
        self._grammars: OrderedDict[tuple[VocabularyKey, str], LLMatcher] = OrderedDict()

    def serve(self, records: Iterable[bytes]) -> None:
        """Answer until there are no more questions."""
        decoder: msgspec.msgpack.Decoder[Question] = msgspec.msgpack.Decoder(Question)
        for record in records:
            match decoder.decode(record):
                case Begin() as begin:
                    self._builder.submit(self._begin, begin)
                case Push(key=key, token_id=token_id):
                    matcher = self._matchers[key]
                    matcher.consume_token(token_id)
                    self._answer(key, matcher)
                case End(key=key):
                    self._builder.submit(self._matchers.pop, key, None)
        self._builder.shutdown(wait=False, cancel_futures=True)

    def _begin(self, begin: Begin) -> None:
        try:
            matcher = self._built(begin).deep_copy()
        except Exception as error:  # whatever it is, it is this sequence's trouble
            self._write(Refused(begin.key, f"the vocabulary cannot be read: {error}", is_ours=True))
            return
        if matcher.is_error():
            self._write(Refused(begin.key, plain(matcher.get_error()), is_ours=False))
            return
        matcher.consume_tokens(list(begin.tokens))
        self._matchers[begin.key] = matcher
        self._answer(begin.key, matcher)

    def _built(self, begin: Begin) -> LLMatcher:
        key = begin.directory, begin.vocab_tokens, begin.stop_token_ids
        matcher = self._grammars.get((key, begin.grammar))
        if matcher is None:
            matcher = LLMatcher(self._vocabulary(key), begin.grammar, log_level=0, limits=limits())
            self._grammars[key, begin.grammar] = matcher
            if len(self._grammars) > MAX_GRAMMARS:
                self._grammars.popitem(last=False)
        self._grammars.move_to_end((key, begin.grammar))
        return matcher

    def _vocabulary(self, key: VocabularyKey) -> LLTokenizer:
        vocabulary = self._vocabularies.get(key)
        if vocabulary is None:
            vocabulary = read_vocabulary(*key)
            self._vocabularies[key] = vocabulary
            if len(self._vocabularies) > MAX_VOCABULARIES:
                gone, _ = self._vocabularies.popitem(last=False)
                for known in [known for known in self._grammars if known[0] == gone]:
                    del self._grammars[known]
        self._vocabularies.move_to_end(key)
        return vocabulary

    def _answer(self, key: int, matcher: LLMatcher) -> None:
        mask = b"" if matcher.is_error() else matcher.compute_bitmask()
        if matcher.is_error():
            message = plain(matcher.get_error())
            self._write(Refused(key, message, is_ours=NOT_ALLOWED in message))
        else:
            self._write(Allowed(key, mask))

    def _write(self, answer: Answer) -> None:
        with self._turn:
            write_frame(self._out, answer)


def main() -> None:
    """Serve stdin until it ends, as it does with the process that asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the server, which ends us
    questions = sys.stdin.buffer
    Host(sys.stdout.buffer).serve(iter(lambda: read_frame(questions), None))
    os._exit(0)  # whatever is being built


if __name__ == "__main__":
    main()
