"""The process that works out which tokens may come next: `-m aegaeon.engine.grammar_host SECONDS
BYTES`.

A process of its own: reading a vocabulary holds the interpreter for a second, and a grammar that
takes too long, or too much, ends it by the kernel's bounds. Frames on stdin and stdout; no torch.
"""

import os
import resource
import signal
import struct
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple

import msgspec
from llguidance import LLMatcher, LLTokenizer

from aegaeon.models.grammar import digest_of, limits, plain
from aegaeon.models.vocabulary import read_vocabulary

# Kept for the next sequence: a vocabulary takes some 170 MB and two seconds to read.
MAX_VOCABULARIES = 4
MAX_GRAMMARS = 64
# What llguidance says of a token that no mask should have allowed. All else that ends a matcher is
# a grammar that takes more than its bounds.
NOT_ALLOWED = "satisfy the grammar"
MAX_GRAMMARS_SHARE = 0.2  # of the memory, for those
# With more than this of the memory in use nothing is built, or what grows by it would end others.
CROWDED_SHARE = 0.6
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


class Began(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """From here until the sequence's answer, its grammar is what takes the time and the memory."""

    key: int
    digest: bytes


class Allowed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Which tokens may come next: a bit for each, in 32-bit words."""

    key: int
    mask: bytes


class Refused(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The sequence cannot go on; `is_ours` where no other grammar would help."""

    key: int
    message: str
    is_ours: bool


class Crowded(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """There is no room for the sequence now."""

    key: int


Question = Begin | Push | End
Answer = Began | Allowed | Refused | Crowded


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


class _Built(NamedTuple):
    matcher: LLMatcher  # to be copied
    grown_bytes: int  # by it; the library does not tell what one takes


class Host:
    """Answers questions. New grammars are built on a thread beside, so that they delay no mask: one
    at a time, each within `cpu_s` of the process."""

    def __init__(self, out: IO[bytes], cpu_s: float, memory_bytes: int) -> None:
        self._out = out
        self._cpu_s = cpu_s
        self._memory_bytes = memory_bytes
        self._turn = threading.Lock()  # to write
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="builder")
        self._begins: dict[int, Future[None]] = {}
        self._matchers: dict[int, LLMatcher] = {}
        self._vocabularies: OrderedDict[VocabularyKey, LLTokenizer] = OrderedDict()
        self._grammars: OrderedDict[tuple[VocabularyKey, str], _Built] = OrderedDict()

    def serve(self, records: Iterable[bytes]) -> None:
        """Answer until there are no more questions."""
        decoder: msgspec.msgpack.Decoder[Question] = msgspec.msgpack.Decoder(Question)
        for record in records:
            match decoder.decode(record):
                case Begin() as begin:
                    self._begins[begin.key] = self._builder.submit(self._begin, begin)
                case Push(key=key, token_id=token_id):
                    matcher = self._matchers[key]
                    matcher.consume_token(token_id)
                    self._answer(key, matcher)
                case End(key=key):
                    self._end(key)
        self._builder.shutdown(wait=False, cancel_futures=True)

    def _end(self, key: int) -> None:
        begin = self._begins.pop(key, None)
        if begin is None or not begin.cancel():  # or nobody's grammar would be built
            self._builder.submit(self._matchers.pop, key, None)

    def _begin(self, begin: Begin) -> None:
        name = begin.directory, begin.vocab_tokens, begin.stop_token_ids
        try:
            if not self._has_room():
                self._write(Crowded(begin.key))
                return
            vocabulary = self._vocabulary(name)
        except MemoryError:
            self._write(Crowded(begin.key))
            return
        except Exception as error:  # whatever it is, it is this sequence's trouble
            self._write(Refused(begin.key, f"the vocabulary cannot be read: {error}", is_ours=True))
            return
        self._write(Began(begin.key, digest_of(begin.grammar)))
        # The kernel ends us when it has run out, whatever the library is in the middle of.
        signal.setitimer(signal.ITIMER_PROF, self._cpu_s)
        try:
            matcher = self._built((name, begin.grammar), vocabulary).deep_copy()
            if matcher.is_error():
                self._write(Refused(begin.key, plain(matcher.get_error()), is_ours=False))
                return
            matcher.consume_tokens(list(begin.tokens))
            self._matchers[begin.key] = matcher
            self._answer(begin.key, matcher)
        except MemoryError:
            self._write(Crowded(begin.key))
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0.0)

    def _built(self, name: tuple[VocabularyKey, str], vocabulary: LLTokenizer) -> LLMatcher:
        built = self._grammars.get(name)
        if built is None:
            before = _size_bytes()
            matcher = LLMatcher(vocabulary, name[1], log_level=0, limits=limits())
            built = self._grammars[name] = _Built(matcher, max(0, _size_bytes() - before))
            while len(self._grammars) > MAX_GRAMMARS or self._is_too_much():
                self._grammars.popitem(last=False)
        else:
            self._grammars.move_to_end(name)
        return built.matcher

    def _is_too_much(self) -> bool:
        kept_bytes = sum(built.grown_bytes for built in self._grammars.values())
        return kept_bytes > MAX_GRAMMARS_SHARE * self._memory_bytes

    def _has_room(self) -> bool:
        """Return whether one more may be built, for which what is only kept may have to go."""
        most_bytes = CROWDED_SHARE * self._memory_bytes
        if _size_bytes() > most_bytes:
            self._grammars.clear()
            self._vocabularies.clear()
        if _size_bytes() > most_bytes and not self._matchers:
            os._exit(0)  # what is free is not given back; whoever comes next starts another one
        return _size_bytes() <= most_bytes

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


def _size_bytes() -> int:
    """Return the bytes of addresses, which are what is bounded."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
    return int(pages) * resource.getpagesize()


def main() -> None:
    """Bound ourselves, then serve stdin until it ends, as it does with the process that asks."""
    cpu_s, memory_bytes = float(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the server, which ends us
    questions = sys.stdin.buffer
    Host(sys.stdout.buffer, cpu_s, memory_bytes).serve(iter(lambda: read_frame(questions), None))
    os._exit(0)  # whatever is being built


if __name__ == "__main__":
    main()
