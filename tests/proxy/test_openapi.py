"""The document says what the routes are: each of them, and who may call it."""

import asyncio
import re

from aegaeon.proxy.guard import NEEDS
from aegaeon.proxy.openapi import PATH, describe
from tests.support.proxy_server import Proxy, in_memory

# What people and browsers look at, not programs.
UNTOLD = {"/", "/static/{name}", PATH}


def test_every_route_is_told_with_its_methods(tmp_path):
    told = describe()["paths"]
    for route in Proxy(tmp_path).app.router.routes:
        path = route.path.replace("{model:path}", "{model}")
        if path in UNTOLD:
            continue
        methods = {method.lower() for method in route.methods} - {"head"}
        assert methods <= set(told[path]), path
    assert {path.replace("{model}", "{model:path}") for path in told} | UNTOLD == set(NEEDS)


def test_what_needs_a_key_says_so():
    for path, methods in describe()["paths"].items():
        is_public = NEEDS[path.replace("{model}", "{model:path}")] == "public"
        for told in methods.values():
            assert ("security" not in told) == is_public


def test_all_that_it_refers_to_is_there():
    document = describe()
    named = set(re.findall(r"#/components/schemas/([^']+)'", str(document)))
    assert named and named <= set(document["components"]["schemas"])


def test_anybody_may_read_it(tmp_path):
    async def test():
        async with in_memory(Proxy(tmp_path)) as client:
            return await client.get(PATH)

    assert asyncio.run(test()).json()["openapi"] == "3.1.0"
