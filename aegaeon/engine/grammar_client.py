"""The grammar host as the engine sees it: its process, and whose fault it is where that ends.

A grammar that brought the process to its bounds is refused from then on. Others that were lost with
it may ask again, of the process that takes its place.
"""

import itertools
import logging
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass, field

import msgspec

from aegaeon.config import child_environment
from aegaeon.engine.grammar_host import (
    Allowed,
    Answer,
    Began,
    Begin,
    Crowded,
    End,
    Push,
    Question,
    Refused,
    read_frame,
    write_frame,
)
from aegaeon.errors import AegaeonError, InvalidRequest, Overloaded
from aegaeon.memory import machine
from aegaeon.memory.budget import GRAMMAR_HOST_MOST_BYTES
from aegaeon.models.grammar import digest_of

log = logging.getLogger(__name__)

BUILD_CPU_S = 4.0  # of one grammar; an ordinary one takes milliseconds, a large one a second
# By the clock, for a process that is not even given the processor: then nobody is to blame. Who is
# stopped at once answers none of these, and is given up after SILENT_S.
ANSWER_S = 15.0
BUILD_S = 30.0
SILENT_S = 60.0  # with neither answers nor builds, as while it starts and reads a vocabulary
LOOK_S = 1.0
CLOSE_S = 15.0
MAX_UNSENT = 1024
MAX_KILLERS = 1024  # remembered
# By the timer and by allocations that fail; anything else is not the fault of what was built.
_EXCESSES = {-signal.SIGPROF, -signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS}
_TOO_MUCH = "the schema takes too much to follow; make it simpler"


class HostLost(AegaeonError):
    """The process ended before it answered; `is_charged`: perhaps because of what was asked."""

    def __init__(self, message: str, is_charged: bool) -> None:
        super().__init__(message)
        self.is_charged = is_charged


@dataclass(slots=True)
class _Asked:
    """A question without an answer yet."""

    answer: "Future[bytearray]"
    pushed_s: float | None  # None: it may have to wait until others are built


@dataclass(slots=True)
class _Process:
    """One life of the host, and what is to be written to it."""

    popen: "subprocess.Popen[bytes]"
    unsent: "queue.SimpleQueue[Question | None]" = field(default_factory=queue.SimpleQueue)
    threads: list[threading.Thread] = field(default_factory=list)

    def write(self) -> None:
        """Write what is asked until there is None, or nobody who reads it."""
        assert self.popen.stdin is not None
        try:
            with self.popen.stdin as pipe:
                while (question := self.unsent.get()) is not None:
                    write_frame(pipe, question)
        except OSError:
            return  # the reader sees its end, too


class GrammarHost:
    """Owns the process, which starts with the first question, and the threads that write to it,
    read from it and watch it. No verb waits for the process, but for `close`."""

    def __init__(
        self, cpu_s: float = BUILD_CPU_S, memory_bytes: int = GRAMMAR_HOST_MOST_BYTES
    ) -> None:
        self._bounds = str(cpu_s), str(memory_bytes)
        self._keys = itertools.count()
        self._lock = threading.Lock()
        self._process: _Process | None = None
        self._open: dict[int, _Asked] = {}  # in the order in which they were asked
        self._building: tuple[Began, float] | None = None  # with since when
        self._heard_s = 0.0
        self._killers: OrderedDict[bytes, None] = OrderedDict()  # digests of grammars
        self._closed = threading.Event()
        self.life = 0  # of the process

    def new_key(self) -> int:
        """Return the name of a new sequence."""
        return next(self._keys)

    def ask(self, key: int, question: Question, life: int) -> "Future[bytearray]":
        """Send a question to the process of this life; its answer comes as a mask, HostLost or
        what Constraint.allowed raises."""
        answer: Future[bytearray] = Future()
        digest = digest_of(question.grammar) if isinstance(question, Begin) else b""
        with self._lock:
            try:
                self._send(key, question, digest, life, answer)
            except AegaeonError as error:
                answer.set_exception(error)
        return answer

    def _send(
        self, key: int, question: Question, digest: bytes, life: int, answer: "Future[bytearray]"
    ) -> None:
        if digest in self._killers:
            self._killers.move_to_end(digest)
            raise InvalidRequest(_TOO_MUCH)
        if life != self.life:
            raise HostLost("the grammar host has ended", is_charged=False)
        process = self._process or self._start()
        if process.unsent.qsize() >= MAX_UNSENT:
            raise Overloaded("too many answers follow schemas; try again later")
        now = time.monotonic()
        if not self._open:
            self._heard_s = now
        self._open[key] = _Asked(answer, now if isinstance(question, Push) else None)
        process.unsent.put(question)

    def end(self, key: int) -> None:
        """Forget a sequence."""
        with self._lock:
            self._open.pop(key, None)
            if self._process is not None:
                self._process.unsent.put(End(key))

    def resident_bytes(self) -> int:
        """Return what the process has in memory; 0 where there is none."""
        with self._lock:
            process = self._process
        if process is None:
            return 0
        try:
            return machine.resident_bytes(process.popen.pid)
        except OSError:  # it has just ended
            return 0

    def close(self) -> None:
        """End the process. Idempotent."""
        self._closed.set()
        with self._lock:
            process = self._process
        if process is not None:
            process.popen.kill()
            for thread in process.threads:
                thread.join(CLOSE_S)

    def _start(self) -> _Process:
        command = (sys.executable, "-m", "aegaeon.engine.grammar_host", *self._bounds)
        environment = child_environment({"RUST_BACKTRACE": "0"})
        pipe = subprocess.PIPE
        try:
            popen = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment)
        except OSError as error:
            text = f"what follows schemas cannot be started ({error}); try again later"
            raise Overloaded(text) from None
        process = _Process(popen)
        for name, target, args in (
            ("write", process.write, ()),
            ("read", self._read, (process,)),
            ("watch", self._watch, (process,)),
        ):
            thread = threading.Thread(
                target=target, args=args, name=f"aegaeon-grammar-{name}", daemon=True
            )
            process.threads.append(thread)
        try:
            for thread in process.threads:
                thread.start()
        except RuntimeError as error:
            popen.kill()
            raise Overloaded(f"{error} for schemas; try again later") from None
        self._process = process
        return process

    def _read(self, process: _Process) -> None:
        decoder: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
        assert process.popen.stdout is not None
        with process.popen.stdout as pipe:
            while (record := read_frame(pipe)) is not None:
                self._on_answer(decoder.decode(record))
        process.popen.kill()  # which changes nothing where it has ended
        code = process.popen.wait()
        process.unsent.put(None)
        with self._lock:
            lost, building = self._open, self._building
            self._open, self._building, self._process = {}, None, None
            self.life += 1
            killer = building[0] if building is not None and code in _EXCESSES else None
            if killer is not None:
                self._killers[killer.digest] = None
                if len(self._killers) > MAX_KILLERS:
                    self._killers.popitem(last=False)
        if not self._closed.is_set():
            what = "a grammar that takes too much" if killer is not None else "unknown"
            log.error("grammar host lost code=%s open=%d cause=%s", code, len(lost), what)
        charged = _suspects(lost, building) if killer is None else frozenset()
        for key, asked in lost.items():
            if killer is not None and key == killer.key:
                asked.answer.set_exception(InvalidRequest(_TOO_MUCH))
            else:
                error = HostLost("the grammar host ended", is_charged=key in charged)
                asked.answer.set_exception(error)

    def _on_answer(self, answer: Answer) -> None:
        with self._lock:
            self._heard_s = time.monotonic()
            if isinstance(answer, Began):
                self._building = answer, self._heard_s
                return
            if self._building is not None and self._building[0].key == answer.key:
                self._building = None
            asked = self._open.pop(answer.key, None)
        if asked is None:
            return  # its sequence has ended
        match answer:
            case Allowed(mask=mask):
                asked.answer.set_result(bytearray(mask))
            case Refused():
                asked.answer.set_exception(_refusal(answer))
            case Crowded():
                text = "too many answers follow large schemas; try again later"
                asked.answer.set_exception(Overloaded(text))

    def _watch(self, process: _Process) -> None:
        """End a process that does not answer: nothing else can end what it is at."""
        while process.popen.poll() is None and not self._closed.wait(LOOK_S):
            with self._lock:
                is_stuck = self._is_stuck(time.monotonic())
            if is_stuck:
                log.error("grammar host does not answer")
                process.popen.kill()

    def _is_stuck(self, now: float) -> bool:
        if not self._open:
            return False
        pushes_s = (one.pushed_s for one in self._open.values() if one.pushed_s is not None)
        if now - next(pushes_s, now) > ANSWER_S:
            return True
        if self._building is not None:
            return now - self._building[1] > BUILD_S
        return now - self._heard_s > SILENT_S


def _refusal(refused: Refused) -> AegaeonError:
    if not refused.is_ours:
        return InvalidRequest(f"the grammar cannot go on: {refused.message}")
    log.error("grammar failed sequence=%d: %s", refused.key, refused.message)
    return AegaeonError(f"the grammar has failed: {refused.message}")


def _suspects(lost: dict[int, _Asked], building: tuple[Began, float] | None) -> frozenset[int]:
    """Return whose questions the process may have been at: pushes are answered in their order,
    beside what is being built; with neither, all, as none may ever be."""
    pushed = [key for key, asked in lost.items() if asked.pushed_s is not None][:1]
    built = [] if building is None else [building[0].key]
    return frozenset(pushed + built or lost)
