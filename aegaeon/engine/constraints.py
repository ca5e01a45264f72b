"""Which tokens the sequences of an engine may have next, asked of a process of its own.

Asked as soon as a token is made and needed a step later: nobody waits for an answer but its own
sequence. A process that ends, or does not answer in time, is replaced; its sequences begin again
from their tokens, once.
"""

import contextlib
import itertools
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait

import msgspec
import torch
from torch import Tensor

from aegaeon.engine.grammar_host import (
    Allowed,
    Answer,
    Begin,
    End,
    Push,
    Question,
    Refused,
    read_frame,
    write_frame,
)
from aegaeon.errors import AegaeonError, InvalidRequest, Overloaded
from aegaeon.types import ModelSpec, Request

log = logging.getLogger(__name__)

ANSWER_S = 15.0  # two seconds for the vocabulary, one for the grammar, and a busy machine
SLOW_S = 0.01  # an answer that is not there after this is not waited for
LOOK_S = 1.0
_COMMAND = (sys.executable, "-m", "aegaeon.engine.grammar_host")


class HostLost(AegaeonError):
    """The process ended before it answered."""


class Constraint:
    """What one sequence may have next. `made` are its generated tokens, which its owner adds to."""

    def __init__(
        self, host: "GrammarHost", spec: ModelSpec, request: Request, made: list[int]
    ) -> None:
        self.key = host.new_key()
        self._host = host
        self._spec = spec
        self._request = request
        self._made = made
        self._losses = 0
        self._asked_s = 0.0
        self._ask_from_the_beginning()

    def push(self, token_id: int) -> None:
        """Take the token that was drawn, which `made` has."""
        if self._host.life != self._life:
            self._ask_from_the_beginning()
            return
        self._ask(Push(self.key, token_id))

    @property
    def is_ready(self) -> bool:
        """Whether it is known what may come, or that nothing may."""
        if not self.answer.done():
            return False
        if isinstance(self.answer.exception(), HostLost) and self._losses == 0:
            self._losses += 1
            self._ask_from_the_beginning()
            return False
        return True

    @property
    def is_slow(self) -> bool:
        """Whether the answer takes longer than a step is to wait."""
        return not self.is_ready and time.monotonic() - self._asked_s > SLOW_S

    def allowed(self) -> Tensor:
        """Return the mask, int32 words. Raises where the sequence cannot go on: InvalidRequest,
        Overloaded, or AegaeonError itself for a mistake of ours."""
        assert self.answer.done()
        try:
            mask = self.answer.result()
        except HostLost:
            raise InvalidRequest("the schema takes too much to follow; make it simpler") from None
        return torch.frombuffer(mask, dtype=torch.int32)

    def close(self) -> None:
        """Forget the sequence."""
        self._host.end(self)

    def _ask_from_the_beginning(self) -> None:
        self._life = self._host.life
        spec, request = self._spec, self._request
        stops, grammar = request.stop_token_ids, request.sampling.grammar
        begin = Begin(self.key, spec.path, spec.vocab_tokens, stops, grammar, tuple(self._made))
        self._ask(begin)

    def _ask(self, question: Question) -> None:
        self._asked_s = time.monotonic()
        self.answer: Future[bytearray] = self._host.ask(self.key, question, self._life)


class GrammarHost:
    """Owns the process, which starts with the first question, and the thread that reads from it."""

    def __init__(self) -> None:
        self._keys = itertools.count()
        self._lock = threading.Lock()
        self._pipe = threading.Lock()  # to write to the process
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._open: dict[int, tuple[float, Future[bytearray]]] = {}  # with when they were asked
        self._closed = threading.Event()
        self.life = 0  # of the process

    def new_key(self) -> int:
        """Return the name of a new sequence."""
        return next(self._keys)

    def ask(self, key: int, question: Question, life: int) -> "Future[bytearray]":
        """Send a question to the process of this life; its answer comes as a mask, HostLost or
        what Constraint.allowed raises."""
        answer: Future[bytearray] = Future()
        with self._lock:
            if life != self.life:
                answer.set_exception(HostLost("the grammar host has ended"))
                return answer
            try:
                process = self._process or self._start()
            except OSError as error:
                text = f"what follows schemas cannot be started ({error}); try again later"
                answer.set_exception(Overloaded(text))
                return answer
            self._open[key] = time.monotonic(), answer
        self._write(process, question)
        return answer

    def end(self, constraint: Constraint) -> None:
        """Forget a sequence."""
        with self._lock:
            self._open.pop(constraint.key, None)
            process = self._process
        if process is not None:
            self._write(process, End(constraint.key))

    def close(self) -> None:
        """End the process. Idempotent."""
        self._closed.set()
        with self._lock:
            process, reader = self._process, self._reader
        if process is not None and reader is not None:
            process.kill()
            reader.join(ANSWER_S)

    def _write(self, process: "subprocess.Popen[bytes]", question: Question) -> None:
        assert process.stdin is not None
        # Not under the lock that the reader takes: the process writes before it reads on.
        with self._pipe:
            try:
                write_frame(process.stdin, question)
            except (OSError, ValueError):
                return  # the reader sees its end, too, and closes the pipe

    def _start(self) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(_COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._process = process
        self._reader = threading.Thread(
            target=self._read, args=(process,), name="aegaeon-grammars", daemon=True
        )
        self._reader.start()
        threading.Thread(
            target=self._watch, args=(process,), name="aegaeon-grammar-watch", daemon=True
        ).start()
        return process

    def _read(self, process: "subprocess.Popen[bytes]") -> None:
        decoder: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
        assert process.stdout is not None and process.stdin is not None
        while (record := read_frame(process.stdout)) is not None:
            answer = decoder.decode(record)
            with self._lock:
                _, future = self._open.pop(answer.key, (0.0, None))
            match answer:
                case _ if future is None:
                    continue  # its sequence has ended
                case Allowed(mask=mask):
                    future.set_result(bytearray(mask))
                case Refused():
                    future.set_exception(_refusal(answer))
        with self._lock:
            lost, self._open = self._open, {}
            self._process = None
            self.life += 1
        code = process.wait()
        process.stdout.close()
        with contextlib.suppress(OSError):  # what was not written is for nobody
            process.stdin.close()
        if not self._closed.is_set():
            log.error("grammar host lost code=%s open=%d", code, len(lost))
        for _, future in lost.values():
            future.set_exception(HostLost("the grammar host ended"))

    def _watch(self, process: "subprocess.Popen[bytes]") -> None:
        """End a process that does not answer: nothing else can end what it is at."""
        while process.poll() is None and not self._closed.wait(LOOK_S):
            with self._lock:
                asked_s = [asked_s for asked_s, _ in self._open.values()]
            if asked_s and time.monotonic() - min(asked_s) > ANSWER_S:
                log.error("grammar host does not answer open=%d", len(asked_s))
                process.kill()


def _refusal(refused: Refused) -> AegaeonError:
    if not refused.is_ours:
        return InvalidRequest(f"the grammar cannot go on: {refused.message}")
    log.error("grammar failed sequence=%d: %s", refused.key, refused.message)
    return AegaeonError(f"the grammar has failed: {refused.message}")


def await_any(constraints: Sequence[Constraint], timeout_s: float) -> None:
    """Return when one of them is ready, or the time is over."""
    wait([one.answer for one in constraints], timeout_s, FIRST_COMPLETED)
