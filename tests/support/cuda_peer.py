"""Another process on the same device, which does as it is told and may be killed at any moment."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any

from tests.support.cuda_device import use_cuda

ANSWER_S = 60


class Peer:
    """A process in which `make` made an object, whose verbs are called from here.

    `make` and what the verbs take and return are pickled. A verb that raises does so here.
    """

    def __init__(self, kind: str, make: Callable[..., Any], *arguments: Any) -> None:
        # A process that has used CUDA cannot be forked.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, kind, make, arguments))
        self._process.start()
        theirs.close()
        self._answer()

    def call(self, verb: str, *arguments: Any) -> Any:
        """Have it call a verb of its object; return what that returned."""
        self._pipe.send((verb, arguments))
        return self._answer()

    def stop(self, is_killed: bool = False) -> None:
        """End it, in order or by SIGKILL. Idempotent."""
        if is_killed and self._process.is_alive():
            assert self._process.pid is not None
            os.kill(self._process.pid, signal.SIGKILL)
        self._pipe.close()  # which it takes for the end
        self._process.join(ANSWER_S)
        assert is_killed or self._process.exitcode in (0, -signal.SIGKILL), self._process.exitcode

    def _answer(self) -> Any:
        assert self._pipe.poll(ANSWER_S), "the other process does not answer"
        result, error = self._pipe.recv()
        if error is not None:
            raise error
        return result


def _serve(pipe: Any, kind: str, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    with use_cuda(kind, is_torch_needed=False), ExitStack() as owned:
        made = owned.enter_context(make(*arguments))
        pipe.send((None, None))
        while True:
            try:
                verb, given = pipe.recv()
            except EOFError:
                break
            try:
                pipe.send((getattr(made, verb)(*given), None))
            except Exception as error:
                pipe.send((None, error))
        del made


@contextmanager
def started(peer: Peer):
    """Stop it at the end, whatever happens."""
    try:
        yield peer
    finally:
        peer.stop(is_killed=True)
