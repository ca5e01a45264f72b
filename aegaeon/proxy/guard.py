"""Who may call which route: what is not in the table here nobody may.

Without a keys file the models are open to whoever reaches the port, other sites' pages excepted,
and what changes the server to callers on this machine.
"""

import ipaddress
from collections.abc import Sequence
from typing import Literal
from urllib.parse import urlsplit

import msgspec
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from aegaeon.proxy import keys
from aegaeon.proxy.failures import ApiError
from aegaeon.proxy.keys import Key, KeyRing
from aegaeon.types import ModelId

Need = keys.Scope | Literal["public"]

# By the path as it was registered. A test walks all routes of the application.
NEEDS: dict[str, Need] = {
    "/": "public",  # the page and its files tell nothing of this server
    "/static/{name}": "public",
    "/openapi.json": "public",
    "/v1/chat/completions": "inference",
    "/v1/completions": "inference",
    "/v1/models": "inference",
    "/v1/models/{model:path}": "inference",
    "/tokenize": "inference",
    "/detokenize": "inference",
    "/admin/decisions": "admin",
    "/admin/status": "admin",
    "/admin/models": "admin",
    "/admin/models/{model:path}": "admin",
    "/admin/models/{model:path}/load": "admin",
    "/admin/models/{model:path}/pin": "admin",
    "/admin/models/{model:path}/unpin": "admin",
    "/metrics": "metrics",
    "/health": "public",
    "/health/live": "public",
    "/health/ready": "public",
}
CALLER = "aegaeon.caller"  # where a request's scope has it
_FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip")


def json_response(value: msgspec.Struct, status: int = 200) -> Response:
    """Return `value` as the body of an answer."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def error_response(error: ApiError) -> Response:
    """Return `error` as an HTTP answer."""
    return Response(error.body(), error.status, error.headers(), "application/json")


class Caller(msgspec.Struct, frozen=True):
    """Who calls: the bearer of `key`, or anybody. `is_open` says that the server has no keys;
    `is_local` that the call comes from this machine, and from no other site's page; `is_foreign`
    that it does come from such a page."""

    key: Key | None = None
    is_open: bool = False
    is_local: bool = False
    is_foreign: bool = False

    def may(self, need: Need) -> bool:
        """Whether they may call what needs this."""
        if need == "public":
            return True
        if self.is_open:
            return self.is_local if need == "admin" else not self.is_foreign
        return self.key is not None and self.key.may(need)

    def may_use(self, names: Sequence[ModelId]) -> bool:
        """Whether they may ask the model of these names, and see that it is served."""
        return self.is_open or (self.key is not None and any(map(self.key.may_use, names)))

    def check_model(self, names: Sequence[ModelId]) -> None:
        """Raise ApiError 403 for a model that is not theirs."""
        if not self.may_use(names):
            text = f"this key may not use {names[0]!r}; /v1/models lists what it may"
            raise ApiError(403, "permission_denied", text, "model")


class Guard:
    """Lets a request through to its route, or answers 401 or 403. The application's state has the
    `keys`: a KeyRing, or None where there are none; without either nobody is let in."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            try:
                scope[CALLER] = _admitted(scope)
            except ApiError as error:
                await error_response(error)(scope, receive, send)
                return
        elif scope["type"] != "lifespan":  # no route takes a WebSocket
            await send({"type": "websocket.close", "code": 1008})
            return
        await self._app(scope, receive, send)


def _admitted(scope: Scope) -> Caller:
    """Return who calls. Raises ApiError when they may not."""
    app = scope["app"]
    caller, has_key = _caller(scope, app.state.keys)
    route = matching(app.router.routes, scope)
    if route is None:
        # Whether there is such a path is nobody's business who has no key.
        is_admitted = caller.is_open or caller.key is not None
        need: Need | None = None
    else:
        # What is not in the table is nobody's.
        need = NEEDS.get(getattr(route, "path", ""))
        is_admitted = need is not None and caller.may(need)
    if is_admitted:
        return caller
    if caller.is_open:
        text = _ONLY_LOCAL if need == "admin" else _NO_OTHER_SITES
        raise ApiError(403, "permission_denied", text)
    if caller.key is None:
        raise _unknown_key(has_key)
    text = f"the key {caller.key.name!r} is not good for this; it needs the scope {need}"
    raise ApiError(403, "permission_denied", text)


_ONLY_LOCAL = (
    "without keys this is open only to programs on the server's own machine; start the server with "
    "--keys-file and send a key with the scope admin"
)
_NO_OTHER_SITES = (
    "without keys this is not open to pages of other sites, and on a loopback address only under "
    "that address or localhost; start the server with --keys-file and send a key"
)


def matching(routes: list[BaseRoute], scope: Scope) -> BaseRoute | None:
    """Return the route that the router will choose: so the two can never read a path differently.
    One that only lacks the method counts, since its answer tells that it is there."""
    partial = None
    for route in routes:
        match, _ = route.matches(scope)
        if match is Match.FULL:
            return route
        if match is Match.PARTIAL and partial is None:
            partial = route
    return partial


def _caller(scope: Scope, ring: KeyRing | None) -> tuple[Caller, bool]:
    """Return who calls, and whether they sent a key."""
    headers = Headers(scope=scope)
    if ring is None:
        # Who listens for others has names that nobody knows here.
        is_own = scope["app"].state.is_loopback and is_loopback((scope.get("server") or ("",))[0])
        is_foreign = _is_of_other_site(headers, has_other_names=not is_own)
        return Caller(None, True, _is_local(scope, headers), is_foreign), False
    kind, _, secret = headers.get("authorization", "").strip().partition(" ")
    secret = secret.strip()
    if kind.lower() != "bearer" or not secret:
        return Caller(), False
    return Caller(ring.find(secret)), True


def _unknown_key(has_key: bool) -> ApiError:
    text = (
        "the API key is not known here"
        if has_key
        else "no API key was sent; send it as Authorization: Bearer KEY"
    )
    return ApiError(401, "invalid_api_key", text)


def _is_local(scope: Scope, headers: Headers) -> bool:
    """Whether a program on this machine calls by itself: for no proxy, and for no web page."""
    peer = scope.get("client")
    if peer is not None and not is_loopback(peer[0]):  # None: a socket in the file system
        return False
    if any(name in headers for name in _FORWARDED):
        return False
    return not _is_of_other_site(headers, has_other_names=False)


def _is_of_other_site(headers: Headers, has_other_names: bool) -> bool:
    """Whether a web page calls across sites, or, unless the server `has_other_names`, under a name
    that was made to lead here."""
    host, origin = headers.get("host", ""), headers.get("origin")
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if origin is not None and urlsplit(origin).netloc != host:
            return True
    except ValueError:  # of brackets without an address
        return True
    is_ours = name == "localhost" or name.endswith(".localhost") or _is_address(name)
    return not (is_ours or has_other_names)


def is_loopback(name: str) -> bool:
    """Whether only this machine reaches the address or name."""
    if name == "localhost":
        return True
    if not _is_address(name):
        return False
    address = ipaddress.ip_address(name)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
