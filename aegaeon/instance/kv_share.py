"""Keys and values of requests that leave, for instances on other nodes to bring there: a listener,
a thread for each connection, offers by name. What is said stands in kv_wire.py."""

import hmac
import logging
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

from aegaeon.errors import ConfigError
from aegaeon.handles import KvStream
from aegaeon.instance.kv_wire import (
    GREETING_S,
    READ,
    TOKEN_BYTES,
    Broken,
    Line,
    give,
    greet,
    hear_question,
    proof_of,
    refuse,
    slices,
)
from aegaeon.scheduler.moving import Links

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 16  # of those that know an offer
MAX_STRANGERS = 16  # that have not greeted; the oldest gives way
JOIN_S = 1.0  # for threads to end at the end


@dataclass(slots=True)
class _Offer:
    token: bytes
    views: list[memoryview]
    until_s: float  # of the monotonic clock
    is_taken: bool = False
    readers: list[Line] = field(default_factory=list)


class KvShare:
    """Serves what is offered, until that is withdrawn. Owns its threads; any thread may call."""

    def __init__(self, host: str, links: Links) -> None:
        """Listen at `host`, on any free port; `links` learns how fast bytes go. Raises
        ConfigError."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, 0), family=family, backlog=64)
        except OSError as error:
            raise ConfigError(
                f"cannot listen at {host} for other nodes ({error}); start Ray there with "
                "--node-ip-address of an address that this machine has"
            ) from None
        bracketed = f"[{host}]" if ":" in host else host
        self.address = f"{bracketed}:{self._listener.getsockname()[1]}"
        self._links = links
        self._lock, self._is_closing = threading.Lock(), False
        self._offers: dict[int, _Offer] = {}
        self._open: dict[threading.Thread, Line] = {}
        self._strangers: dict[threading.Thread, Line] = {}  # the oldest first
        self._accepting = threading.Thread(target=self._accept, name="kv share", daemon=True)
        self._accepting.start()

    def offer(self, views: list[memoryview], within_s: float) -> KvStream:
        """Let the bytes of `views` be had for so long, or until that is withdrawn."""
        name, token = secrets.randbits(63), secrets.token_bytes(TOKEN_BYTES)
        with self._lock:
            self._offers[name] = _Offer(token, views, time.monotonic() + within_s)
        return KvStream(self.address, name, token)

    def withdraw(self, stream: KvStream) -> bool:
        """Let nobody have the bytes of an offer any more; say whether somebody was told that he has
        them all. From then on they may change. Idempotent."""
        with self._lock:
            offer = self._offers.pop(stream.name, None)
            readers = [] if offer is None else tuple(offer.readers)
        for line in readers:
            line.close()
        return offer is not None and offer.is_taken

    def close(self) -> None:
        """Serve no more. Idempotent."""
        with self._lock:
            self._is_closing = True
            self._offers.clear()
            threads = self._strangers | self._open
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for line in threads.values():
            line.close()
        for thread in (self._accepting, *threads):
            thread.join(JOIN_S)

    def _accept(self) -> None:
        while not self._is_closing:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                time.sleep(0.05)  # gone again before it was accepted, or too many files are open
                continue
            try:
                self._begin(connection)
            except (OSError, RuntimeError) as error:  # it has ended; no more threads are to be had
                log.warning("connection for KV not served error=%s", error)
                connection.close()

    def _begin(self, connection: socket.socket) -> None:
        line, oldest = Line(connection, time.monotonic() + GREETING_S), None
        thread = threading.Thread(target=self._serve, args=(line,), daemon=True)
        with self._lock:
            if self._is_closing:
                line.close()
                return
            thread.start()
            if len(self._strangers) >= MAX_STRANGERS:
                oldest = self._strangers.pop(next(iter(self._strangers)))
            self._strangers[thread] = line
        if oldest is not None:
            oldest.close()

    def _serve(self, line: Line) -> None:
        offer = None
        try:
            name, nonces, proof = greet(line)
            offer = self._admit(line, name, nonces, proof)
            self._answer(line, name, offer)
        except (Broken, OSError) as error:
            log.debug("connection for KV ended error=%s", error)
        except Exception:
            log.exception("serving KV failed")
        finally:
            line.close()
            with self._lock:
                for lines in (self._strangers, self._open):
                    lines.pop(threading.current_thread(), None)
                if offer is not None:
                    offer.readers.remove(line)

    def _admit(self, line: Line, name: int, nonces: bytes, proof: bytes) -> _Offer:
        with self._lock:
            offer = self._offers.get(name)
            # For unknown names as much is computed.
            token = b"\0" * TOKEN_BYTES if offer is None else offer.token
            if not hmac.compare_digest(proof_of(token, name, nonces), proof) or offer is None:
                raise Broken("it does not know the token of an offer")
            if self._strangers.pop(threading.current_thread(), None) is None:
                raise Broken("it was too long a stranger")
            if len(self._open) >= MAX_CONNECTIONS:
                raise Broken("too many are served")  # who wants it prefills again
            self._open[threading.current_thread()] = line
            offer.readers.append(line)
            line.agree(offer.token, nonces)
            line.extend(offer.until_s)
            return offer

    def _answer(self, line: Line, name: int, offer: _Offer) -> None:
        began_s, sent_bytes = time.monotonic(), 0
        while True:
            what, at, size = hear_question(line)
            with self._lock:
                is_there = self._offers.get(name) is offer
                if is_there and what != READ:
                    offer.is_taken = True
            if not is_there:
                refuse(line)
                return
            if what != READ:
                give(line)
                self._links.note(sent_bytes, time.monotonic() - began_s)
                return
            parts = slices(offer.views, at, size)
            sent_bytes += sum(map(len, parts))
            give(line, parts)
