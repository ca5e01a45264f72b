"""The page's files as HTTP hands them out; what it does in a browser: end_to_end/test_page.py."""

import asyncio
import gzip
import re
from importlib.resources import files

import pytest

from aegaeon.proxy.page import CHARTS, INDEX, names, read
from tests.support.proxy_server import Proxy, in_memory

OURS = sorted(names() - {CHARTS})


@pytest.fixture
def get(tmp_path):
    """Asks the application, in memory."""
    proxy = Proxy(tmp_path)

    def ask(path, **headers):
        async def whole():
            async with in_memory(proxy) as client:
                return await client.get(path, headers=headers)

        return asyncio.run(asyncio.wait_for(whole(), 60))

    return ask


def test_the_page_and_all_it_names_are_there(get):
    page = get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    named = re.findall(r'(?:src|href)="(/static/[^"]+)"', page.text)
    assert len(named) == 4
    for path in named:
        assert get(path).status_code == 200, path


def test_modules_import_what_is_there():
    for name in OURS:
        for imported in re.findall(r'from "\./([^"]+)"', read(name).body.decode()):
            assert imported in names(), name


def test_nothing_is_asked_of_another_host():
    for name in OURS:
        addresses = re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"')]*", read(name).body.decode())
        assert [a for a in addresses if "www.w3.org/2000/svg" not in a] == [], name


def test_a_policy_keeps_others_out(get):
    policy = get("/").headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe-eval" not in policy
    assert "frame-ancestors 'none'" in policy


def test_files_come_compressed_and_are_not_sent_twice(get):
    plain = get(f"/static/{CHARTS}", **{"accept-encoding": "identity"})
    packed = get(f"/static/{CHARTS}", **{"accept-encoding": "gzip"})
    assert packed.content == plain.content == gzip.decompress(read(CHARTS).packed)
    assert int(packed.headers["content-length"]) < len(plain.content) / 2
    again = get("/static/page.js", **{"if-none-match": read("page.js").tag})
    assert again.status_code == 304
    assert again.content == b""


@pytest.mark.parametrize(
    "name", ["none.js", "..%2fpage.py", "%2e%2e/page.py", "/etc/passwd", "page.py", "%00"]
)
def test_other_files_are_not(get, name):
    answer = get(f"/static/{name}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


def test_the_package_brings_what_is_in_the_directory():
    there = {file.name for file in files("aegaeon.proxy").joinpath("static").iterdir()}
    assert set(OURS) == there
    assert INDEX in there
