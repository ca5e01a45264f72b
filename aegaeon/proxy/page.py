"""The page at `/` and its files, all from installed packages: no path comes from a client, and
nothing is asked of another host."""

import asyncio
import gzip
import hashlib
import importlib.util
from functools import cache
from importlib.resources import files
from pathlib import Path

import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from aegaeon.errors import ConfigError
from aegaeon.proxy.failures import ApiError

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
INDEX = "index.html"
CHARTS = "plotly.js"
# Plotly writes style elements; nothing else of the page may come from anywhere but here.
POLICY = (
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class File(msgspec.Struct, frozen=True):
    """A file of the page, compressed too."""

    body: bytes
    packed: bytes
    kind: str
    tag: str


def add_page(app: FastAPI) -> None:
    """Enter the routes of the page. They tell nothing of the server and need no key."""
    look = ["GET", "HEAD"]
    app.add_api_route("/", index, methods=look, response_model=None)
    app.add_api_route("/static/{name}", static, methods=look, response_model=None)


async def index(request: Request) -> Response:
    """GET /: the page."""
    return await _answer(request, INDEX)


async def static(request: Request) -> Response:
    """GET /static/{name}: one of the page's files."""
    return await _answer(request, request.path_params["name"])


async def _answer(request: Request, name: str) -> Response:
    if name not in names():
        raise ApiError(404, "not_found", "the page has no such file")
    # The charts take a tenth of a second to compress, once.
    file = await asyncio.to_thread(read, name)
    headers = {
        "etag": file.tag,
        "cache-control": "no-cache",
        "content-security-policy": POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "vary": "accept-encoding",
    }
    if request.headers.get("if-none-match") == file.tag:
        return Response(status_code=304, headers=headers)
    body = file.body
    if "gzip" in request.headers.get("accept-encoding", ""):
        headers["content-encoding"] = "gzip"
        body = file.packed
    return Response(body, headers=headers, media_type=file.kind)


@cache
def names() -> frozenset[str]:
    """Return the names of the page's files."""
    ours = files("aegaeon.proxy").joinpath("static").iterdir()
    return frozenset({CHARTS, *(file.name for file in ours if Path(file.name).suffix in TYPES)})


@cache
def read(name: str) -> File:
    """Return one of `names`."""
    if name == CHARTS:
        body = _charts().read_bytes()
    else:
        body = files("aegaeon.proxy").joinpath("static", name).read_bytes()
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    return File(body, gzip.compress(body, 6, mtime=0), TYPES[Path(name).suffix], tag)


def _charts() -> Path:
    """Return Plotly's file, without importing the package, which takes a while."""
    found = importlib.util.find_spec("plotly")
    if found is None or found.origin is None:
        raise ConfigError("plotly is not installed; install aegaeon again: pip install aegaeon")
    return Path(found.origin).parent / "package_data" / "plotly.min.js"
