"""Chat templates rendered where they can do no harm: in processes of their own, with bounds on time
and memory that the kernel holds.
"""

import contextlib
import itertools
import logging
import queue
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from typing import Any

import msgspec

from aegaeon.config import child_environment
from aegaeon.errors import CheckpointError, InvalidRequest, Overloaded
from aegaeon.proxy.frames import receive_frame, send_frame
from aegaeon.proxy.render_worker import (
    MAX_FRAME_BYTES,
    Refused,
    Render,
    Rendered,
    Rendering,
    Unusable,
)

log = logging.getLogger(__name__)

CPU_S = 2.0  # of one rendering; an ordinary one takes a millisecond
MEMORY_BYTES = 1 << 30  # addresses of a process, with interpreter and libraries
ANSWER_S = 60.0  # a process that is not even given the processor is given up
MAX_PROCESSES = 4
CROWDED_S = 0.25  # waited for a process before another one is started

_TOO_MUCH = "the model's chat template takes too long for this conversation; shorten it"


@dataclass(slots=True)
class _Process:
    """One process; used by one thread at a time."""

    process: "subprocess.Popen[bytes]"
    peer: socket.socket
    known: set[int] = field(default_factory=set)  # the templates it has compiled

    def ask(self, asked: bytes) -> bytes | None:
        """Return its answer, or None when it is gone or is given up."""
        try:
            send_frame(self.peer, asked)
            return receive_frame(self.peer, MAX_FRAME_BYTES)
        except OSError as error:
            log.warning("template process lost pid=%d error=%s", self.process.pid, error)
            return None

    def end(self) -> None:
        """End and reap it."""
        self.peer.close()
        self.process.kill()
        self.process.wait()


class Renderer:
    """Renders templates, some at a time. Owns its processes, which start when first needed, until
    `close`. Any thread may call any verb."""

    def __init__(self, cpu_s: float = CPU_S, memory_bytes: int = MEMORY_BYTES) -> None:
        self._cpu_s = cpu_s
        self._memory_bytes = memory_bytes
        self._keys = itertools.count()
        self._decoder: msgspec.msgpack.Decoder[Rendering] = msgspec.msgpack.Decoder(Rendering)
        self._lock = threading.Lock()
        self._idle: queue.LifoQueue[_Process] = queue.LifoQueue()
        self._count = 0
        self._is_closed = False

    def template(self, source: str, tokens: dict[str, str]) -> "BoundTemplate":
        """Return the template `source`, compiled when first used."""
        return BoundTemplate(self, next(self._keys), source, tokens)

    def render(self, asked: Render, source: str, tokens: dict[str, str]) -> str:
        """Return the prompt. Raises CheckpointError, InvalidRequest, Overloaded."""
        process = self._take()
        try:
            if asked.key not in process.known:
                asked = msgspec.structs.replace(asked, source=source, tokens=tokens)
            frame = msgspec.msgpack.encode(asked)
        except (OverflowError, TypeError, RecursionError) as error:
            self._give_back(process)
            raise InvalidRequest(
                f"the conversation holds what no template takes: {error}"
            ) from None
        try:
            answer = process.ask(frame)
        except BaseException:
            self._bury(process)
            raise
        if answer is None:
            self._bury(process)
            raise InvalidRequest(_TOO_MUCH)
        result = self._decoder.decode(answer)
        if not isinstance(result, Unusable):
            process.known.add(asked.key)
        self._give_back(process)
        match result:
            case Rendered(text=text):
                return text
            case Refused(message=message):
                raise InvalidRequest(message)
            case Unusable(message=message):
                raise CheckpointError(message)

    def close(self) -> None:
        """End the processes. What is being rendered ends with them. Idempotent."""
        with self._lock:
            self._is_closed = True
        while True:
            try:
                self._bury(self._idle.get_nowait())
            except queue.Empty:
                return

    def _take(self) -> _Process:
        """Return a process that lives and is nobody else's now."""
        with contextlib.suppress(queue.Empty):
            while True:
                process = self._idle.get(timeout=CROWDED_S if self._count else 0.001)
                if process.process.poll() is None:
                    return process
                self._bury(process)
        with self._lock:
            if self._is_closed:
                raise Overloaded("the server is stopping; ask again later")
            may_start = self._count < MAX_PROCESSES
            self._count += may_start
        if may_start:
            try:
                return self._start()
            except BaseException:
                with self._lock:
                    self._count -= 1
                raise
        try:
            return self._idle.get(timeout=ANSWER_S)
        except queue.Empty:
            raise Overloaded("too many chats are being prepared; ask again later") from None

    def _give_back(self, process: _Process) -> None:
        with self._lock:
            is_closed = self._is_closed
            if not is_closed:
                self._idle.put(process)
        if is_closed:
            self._bury(process)

    def _bury(self, process: _Process) -> None:
        process.end()
        with self._lock:
            self._count -= 1

    def _start(self) -> _Process:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = self._spawn(theirs.fileno())
            except OSError as error:
                ours.close()
                raise Overloaded(f"no process for the chat template ({error.strerror})") from None
        ours.settimeout(ANSWER_S)
        return _Process(process, ours)

    def _spawn(self, descriptor: int) -> "subprocess.Popen[bytes]":
        bounds = (str(descriptor), str(self._cpu_s), str(self._memory_bytes))
        return subprocess.Popen(
            [sys.executable, "-m", "aegaeon.proxy.render_worker", *bounds],
            stdin=subprocess.DEVNULL,
            pass_fds=(descriptor,),
            env=child_environment({}),
        )


class BoundTemplate:
    """A model's template, rendered by `renderer`: the same prompts as a ChatTemplate's."""

    def __init__(self, renderer: Renderer, key: int, source: str, tokens: dict[str, str]) -> None:
        self._renderer = renderer
        self._key = key
        self.source = source
        self._tokens = tokens

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        extras: dict[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the prompt, ending where the assistant's answer begins, unless that is to be left.

        Raises InvalidRequest when the template refuses the conversation or takes more than it may,
        CheckpointError when it cannot be compiled, Overloaded.
        """
        asked = Render(self._key, messages, tools, extras, add_generation_prompt)
        return self._renderer.render(asked, self.source, self._tokens)
