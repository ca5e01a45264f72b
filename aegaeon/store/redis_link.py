"""The connection to a Redis server: bounded retries, and errors without passwords."""

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ConnectionError,
    RedisError,
    ResponseError,
    TimeoutError,
)
from redis.retry import Retry

from aegaeon.errors import ConfigError, StoreUnavailable

log = logging.getLogger(__name__)

_T = TypeVar("_T")

SOCKET_TIMEOUT_S = 5.0
FIRST_PAUSE_S = 0.01
LONGEST_PAUSE_S = 0.25


class RedisLink:
    """A client of one server that survives its restarts. Thread-safe; `close` is idempotent."""

    def __init__(self, url: str, patience_s: float) -> None:
        """Name the server; connects at the first call. Raises ConfigError on a bad URL."""
        self.shown_url = without_password(url)
        self._patience_s = patience_s
        self.unheard_s = float("-inf")  # when something was asked for the last time in vain
        try:
            self.client = redis.Redis.from_url(
                url,
                socket_timeout=SOCKET_TIMEOUT_S,
                socket_connect_timeout=SOCKET_TIMEOUT_S,
                retry=Retry(NoBackoff(), 0),
            )
        except (ValueError, TypeError):
            raise ConfigError(
                f"--redis-url {self.shown_url} is not a Redis URL; "
                "write redis://user:password@host:port/number, or rediss:// or unix://"
            ) from None

    def call(
        self, operation: Callable[[], _T], pause: Callable[[float], object] = time.sleep
    ) -> _T:
        """Run `operation`, which must bear being run twice, until the server answers.

        `pause` sleeps between tries. Raises StoreUnavailable when there was no answer for as long
        as the patience, or the server refuses.
        """
        deadline_s = time.monotonic() + self._patience_s
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                return operation()
            except (AuthenticationError, AuthorizationError, ResponseError) as error:
                raise StoreUnavailable(
                    f"Redis at {self.shown_url} refuses: {error}; check its user, password, "
                    "rights and memory"
                ) from None
            except (ConnectionError, TimeoutError, OSError) as error:
                self.unheard_s = time.monotonic()
                if time.monotonic() + pause_s > deadline_s:
                    raise self.unavailable(error) from None
                if pause_s == FIRST_PAUSE_S:
                    log.warning("redis connection lost url=%s error=%s", self.shown_url, error)
            except RedisError as error:
                raise self.unavailable(error) from None
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


def without_password(url: str) -> str:
    """Return `url` as it may be shown: without its password and its query."""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
        user = f"{parts.username}@" if parts.username else ""
    except ValueError:
        return "(malformed)"
    return f"{parts.scheme}://{user}{parts.hostname or ''}{port}{parts.path}"
