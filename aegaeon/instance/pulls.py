"""Keys and values on their way here from other nodes: each on a thread, beside what computes."""

import logging
import queue
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from aegaeon.engine.exchange import KvExchange, Room
from aegaeon.errors import KvGone, Overloaded
from aegaeon.handles import KvStream
from aegaeon.instance.kv_wire import GREETING_S, Broken, Line, ask, bring, take
from aegaeon.types import Cancel, Request, RequestId, Transfer

log = logging.getLogger(__name__)

MAX_PULLS = 16  # at a time; more are declined, and offered again
MAX_PULL_S = 30.0  # the most that one may take, whatever its sender says
JOIN_S = 1.0  # for threads to end at the end
Key = tuple[RequestId, int, int]  # with the attempt and its moves


@dataclass(slots=True)
class Pull:
    """One request's. Its `room` is its taker's once that is told; `failure` says why it has not
    come."""

    transfer: Transfer
    room: Room
    thread: threading.Thread | None = None
    line: Line | None = None
    is_unwanted: bool = False
    failure: str = ""
    took_s: float = 0.0


class Pulls:
    """Owned by one runtime, whose thread calls all verbs; `wake` is called when one is done."""

    def __init__(self, exchange: KvExchange, wake: Callable[[], None]) -> None:
        self._exchange = exchange
        self._wake = wake
        self._pulls: dict[Key, Pull] = {}
        self._done: queue.SimpleQueue[Pull] = queue.SimpleQueue()  # bounded by MAX_PULLS

    def __contains__(self, key: Key) -> bool:
        """Whether this move of the request is under way."""
        return key in self._pulls

    def begin(self, transfer: Transfer, within_s: float) -> None:
        """Bring what `transfer` names, in `within_s`. Raises KvGone, OutOfBlocks, Overloaded."""
        if len(self._pulls) >= MAX_PULLS:
            raise Overloaded(f"{MAX_PULLS} requests are on their way here; offer it again")
        request, stream = transfer.request, transfer.kv.stream
        assert stream is not None
        pull = Pull(transfer, self._exchange.make_room(request.model, transfer.kv))
        until_s = time.monotonic() + min(within_s, MAX_PULL_S)
        pull.thread = threading.Thread(
            target=self._run, args=(pull, stream, until_s), name="kv pull", daemon=True
        )
        self._pulls[key_of(request)] = pull
        pull.thread.start()

    def cancel(self, cancel: Cancel) -> None:
        """Nobody waits for a request any more; what is done of it is unwanted."""
        for (request, attempt, _), pull in self._pulls.items():
            if request == cancel.request_id and cancel.covers(attempt):
                pull.is_unwanted = True
                line = pull.line
                if line is not None:
                    line.close()

    def done(self) -> list[Pull]:
        """Return, once, those that have ended; the caller adopts or frees their rooms."""
        ended: list[Pull] = []
        while not self._done.empty():
            pull = self._done.get_nowait()
            del self._pulls[key_of(pull.transfer.request)]
            ended.append(pull)
        return ended

    def free(self, pull: Pull) -> None:
        """Free the room of one that is done."""
        self._exchange.free(pull.room)

    def close(self) -> None:
        """End all. What has come stays in no pool: the engine's is closed behind this."""
        for pull in self._pulls.values():
            pull.is_unwanted = True
            if pull.line is not None:
                pull.line.close()
        for pull in self._pulls.values():
            if pull.thread is not None:
                pull.thread.join(JOIN_S)

    def _run(self, pull: Pull, stream: KvStream, until_s: float) -> None:
        began_s = time.monotonic()
        try:
            bring_all(stream, pull, until_s)
        except (KvGone, Broken, OSError, ValueError) as error:
            pull.failure = str(error) or type(error).__name__
        except Exception as error:
            log.exception("bringing KV failed")
            pull.failure = str(error) or type(error).__name__
        pull.took_s = time.monotonic() - began_s
        self._done.put(pull)
        self._wake()


def key_of(request: Request) -> Key:
    """Return what tells this move of the request from all others."""
    return request.id, request.attempt, request.moves


def bring_all(stream: KvStream, pull: Pull, until_s: float) -> None:
    """Fill the pull's room, and have the sender agree that it is ours. Raises KvGone, Broken,
    OSError, ValueError (no address)."""
    host, _, port = stream.address.rpartition(":")
    address = host.removeprefix("[").removesuffix("]"), int(port)
    left_s = min(GREETING_S, until_s - time.monotonic())
    if left_s <= 0.0:
        raise TimeoutError("the offer is over")
    line = pull.line = Line(socket.create_connection(address, left_s), until_s)
    try:
        if pull.is_unwanted:
            return
        ask(line, stream.name, stream.token)
        bring(line, pull.room.views)
        take(line)
    finally:
        line.close()
