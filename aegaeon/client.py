"""Asks a running server something, for commands: one call, its JSON, or an error of ours."""

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from aegaeon.errors import AegaeonError, ConfigError, InvalidRequest, StoreUnavailable

URL = "http://127.0.0.1:8080"
TIMEOUT_S = 60.0


class Client:
    """A server at `url`, asked with `key` where it asks for one."""

    def __init__(self, url: str, key: str = "") -> None:
        """Raises ConfigError."""
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--url must begin with http:// or https://, not be {url!r}")
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return the answer's JSON. Raises InvalidRequest with what the server says, and
        StoreUnavailable where none answers."""
        data = None if body is None else json.dumps(body).encode()
        headers = dict(self._headers)
        if data is not None:
            headers["Content-Type"] = "application/json"
        asked = urllib.request.Request(self._url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(asked, timeout=TIMEOUT_S) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise self._refused(error) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise StoreUnavailable(
                f"no server answers at {self._url} ({reason}); see --url"
            ) from None

    def _refused(self, error: urllib.error.HTTPError) -> AegaeonError:
        try:
            message = json.loads(error.read())["error"]["message"]
        except (ValueError, KeyError, TypeError, OSError):
            message = f"{self._url} answers with status {error.code}; is it an aegaeon server?"
        return InvalidRequest(str(message))


def quoted(name: str) -> str:
    """Return `name` as a part of a path; slashes stay."""
    return urllib.parse.quote(name, safe="/")
