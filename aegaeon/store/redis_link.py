"""The connection to a Redis server: bounded retries, and errors without passwords.

A server may be replaced by another one that lacks the last things that it had acknowledged: by a
failover, or by itself after a restart. Each run of a server has a name of its own, which is asked
for at each connection; what is under way when another run is met is begun anew, so that who goes by
what the last run said (redis_mailbox.py) may think again.
"""

import logging
import math
import re
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.connection import SSLConnection, UnixDomainSocketConnection
from redis.credentials import CredentialProvider
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ClusterDownError,
    ConnectionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
)
from redis.retry import Retry
from redis.sentinel import Sentinel

from aegaeon.errors import StoreUnavailable
from aegaeon.store.redis_faults import certain_fault, found_fault
from aegaeon.store.redis_url import Login, RedisPlace, read_place

log = logging.getLogger(__name__)

_T = TypeVar("_T")

SOCKET_TIMEOUT_S = 5.0
SENTINEL_TIMEOUT_S = 1.0  # others may answer
FIRST_PAUSE_S = 0.01
LONGEST_PAUSE_S = 0.25
REPAIR_PAUSE_S = 0.1


class RedisLink:
    """A client of one server, or of the master that Sentinels name, that survives its restarts and
    failovers. Thread-safe; `close` is idempotent."""

    def __init__(self, url: str, patience_s: float, answer_s: float = math.inf) -> None:
        """Name the server; connects at the first call. `answer_s` is the longest wait for one
        answer, SOCKET_TIMEOUT_S at most. Raises ConfigError on a bad URL."""
        self._place = read_place(url)
        self.shown_url = self._place.shown
        self.patience_s = patience_s
        self.answer_s = min(answer_s, SOCKET_TIMEOUT_S)
        self.unheard_s = float("-inf")  # when something was asked for the last time in vain
        self._run = ""
        self.epoch = 0  # runs of the server met after the first
        # Called once another run is met, and again while it says that not all is done.
        self.on_new_run: Callable[[], bool] = lambda: True
        self._repair_at_s: float | None = None
        self._met = threading.local()
        self.client = _client(self._place, self._meet, self.answer_s)

    def call(
        self, operation: Callable[[], _T], pause: Callable[[float], object] = time.sleep
    ) -> _T:
        """Run `operation`, which must bear being run twice, until the server answers.

        `pause` sleeps between tries. Raises StoreUnavailable when there was no answer for as long
        as the patience, or the server refuses.
        """
        deadline_s = time.monotonic() + self.patience_s
        pause_s = FIRST_PAUSE_S
        while True:
            self._met.epoch = self.epoch
            try:
                answer = operation()
            except _AnotherRun:
                continue  # at most once for each
            except (ReadOnlyError, ClusterDownError) as error:
                # Demoted behind our back: the name, or the Sentinels, lead to another one.
                self.client.connection_pool.disconnect()
                self._note_silence(error, deadline_s, pause_s)
            except (AuthenticationError, AuthorizationError, ResponseError) as error:
                raise self._refused(error) from None
            except (ConnectionError, TimeoutError, OSError) as error:
                self._note_silence(error, deadline_s, pause_s)
            except RedisError as error:
                raise self.unavailable(error) from None
            else:
                self._repair()
                return answer
            pause(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def server_run(self) -> str:
        """Return what names this run of the server: another one may have forgotten things."""
        return str(self.call(lambda: self.client.info("server"))["run_id"])

    def unavailable(self, error: Exception) -> StoreUnavailable:
        """Return the error that says so."""
        return StoreUnavailable(
            f"Redis at {self.shown_url} does not answer ({error}); start it, correct --redis-url, "
            "or use --metadata-backend shared_memory"
        )

    def script(self, text: str) -> Callable[..., Any]:
        """Return `text`, Lua, as a function of (keys, args) that runs atomically on the server."""
        run = self.client.register_script(text)
        return lambda keys, args: run(keys=keys, args=args)

    def close(self) -> None:
        """Close all connections."""
        self.client.close()

    def _meet(self, connection: Any) -> None:
        """Greet a server. Raises _AnotherRun where it is not the run that was met before, and
        ConnectionError where it is no master."""
        connection.on_connect()
        connection.send_command("INFO", "server")
        found = re.search(rb"run_id:(\w+)", _bytes(connection.read_response()))
        run = found[1].decode() if found else ""
        if self._place.service:
            connection.send_command("ROLE")
            if _bytes(connection.read_response()[0]) != b"master":
                raise ConnectionError("it is a replica, whatever the Sentinel says")
        if run != self._run:
            is_first, self._run = not self._run, run
            if not is_first:
                log.info("another run of redis url=%s run=%s", self.shown_url, run)
                self.epoch += 1
                self._repair_at_s = 0.0
        if self._met.__dict__.get("epoch", self.epoch) != self.epoch:
            raise _AnotherRun

    def _repair(self) -> None:
        due_s = self._repair_at_s
        if due_s is None or time.monotonic() < due_s:
            return
        self._repair_at_s = None
        try:
            is_done = self.on_new_run()
        except StoreUnavailable as error:
            log.warning("not all repaired error=%s", error)
            is_done = False
        if not is_done:
            self._repair_at_s = time.monotonic() + REPAIR_PAUSE_S

    def _note_silence(self, error: Exception, deadline_s: float, pause_s: float) -> None:
        """Raises StoreUnavailable where there is no use in another try, or no time."""
        is_first = pause_s == FIRST_PAUSE_S
        self.unheard_s = time.monotonic()
        fault = certain_fault(error)
        if not fault and not self._run and is_first and not isinstance(error, ResponseError):
            fault = found_fault(self._place)
        if fault:
            raise StoreUnavailable(f"Redis at {self.shown_url} cannot be used: {fault}")
        if time.monotonic() + pause_s > deadline_s:
            raise self.unavailable(error)
        if is_first:
            log.warning("redis connection lost url=%s error=%s", self.shown_url, error)

    def _refused(self, error: Exception) -> StoreUnavailable:
        if isinstance(error, OutOfMemoryError):
            return StoreUnavailable(
                f"Redis at {self.shown_url} has no memory left (maxmemory is reached); raise "
                "maxmemory, or remove what else it holds"
            )
        return StoreUnavailable(
            f"Redis at {self.shown_url} refuses: {error}; check its user, password, "
            "rights and memory"
        )


class _AnotherRun(ConnectionError):
    """What is under way was meant for a server that has been replaced since."""


class _Credentials(CredentialProvider):
    """A login, read anew for each connection."""

    def __init__(self, login: Login) -> None:
        self._login = login

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """See CredentialProvider."""
        password = self._login.read()
        return (self._login.username, password) if self._login.username else (password,)


def _client(place: RedisPlace, meet: Callable[[Any], None], answer_s: float) -> "redis.Redis":
    tls: dict[str, Any] = place.tls
    options: dict[str, Any] = {
        "db": place.database,
        "socket_timeout": answer_s,
        "socket_connect_timeout": answer_s,
        "retry": Retry(NoBackoff(), 0),
        "redis_connect_func": meet,
        **_login(place.login),
        **tls,
    }
    if place.service:
        over: dict[str, Any] = {"ssl": True} if place.is_tls else {}
        asked = {
            "socket_timeout": min(SENTINEL_TIMEOUT_S, answer_s),
            "socket_connect_timeout": min(SENTINEL_TIMEOUT_S, answer_s),
            "retry": Retry(NoBackoff(), 0),
            **_login(place.sentinel_login),
            **tls,
            **over,
        }
        sentinel: Any = Sentinel(  # type: ignore[no-untyped-call]
            place.servers, sentinel_kwargs=asked, **options, **over
        )
        client: redis.Redis = sentinel.master_for(place.service)
        return client
    if place.socket:
        options |= {"path": place.socket, "connection_class": UnixDomainSocketConnection}
    else:
        host, port = place.servers[0]
        options |= {"host": host, "port": port}
        if place.is_tls:
            options["connection_class"] = SSLConnection
    return redis.Redis.from_pool(redis.ConnectionPool(**options))


def _login(login: Login) -> dict[str, Any]:
    if not (login.username or login.password or login.file):
        return {}
    return {"credential_provider": _Credentials(login)}


def _bytes(found: Any) -> bytes:
    return found if isinstance(found, bytes) else str(found).encode()
