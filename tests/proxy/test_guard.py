"""Who is let in: no route without a line in the table, no path around it, keys and their scopes."""

import asyncio
import json

import httpx
import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from aegaeon.proxy.guard import NEEDS, Caller
from aegaeon.proxy.keys import SCOPES, checked_key, create_key, revoke_key
from aegaeon.proxy.reload import LOOK_S
from tests.support.proxy_server import Proxy, in_memory

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PURGE")


@pytest.fixture
def keys(tmp_path):
    """A keys file with a key per scope; returns (file, secrets by scope)."""
    file = tmp_path / "keys.json"
    secrets = {
        scope: create_key(file, checked_key({"name": f"only-{scope}", "scopes": [scope]}))
        for scope in SCOPES
    }
    return file, secrets


def bearer(secret):
    return {"Authorization": f"Bearer {secret}"}


def run(proxy, test):
    async def whole():
        async with in_memory(proxy) as client:
            return await test(client)

    return asyncio.run(asyncio.wait_for(whole(), 60))


def filled(path):
    return path.replace("{model:path}", "m").replace("{model}", "m")


def assert_error(response, status, code):
    assert (response.status_code, response.headers["x-request-id"] != "") == (status, True)
    if response.request.method != "HEAD":
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == code


def test_every_route_stands_in_the_table(tmp_path):
    routes = Proxy(tmp_path).app.router.routes
    assert routes
    assert [route.path for route in routes if route.path not in NEEDS] == []


def test_without_a_key_every_route_but_public_ones_answers_401(tmp_path, keys):
    file, _ = keys
    proxy = Proxy(tmp_path, keys_file=str(file))

    async def test(client):
        for route in proxy.app.router.routes:
            for method in METHODS:
                response = await client.request(method, filled(route.path))
                if NEEDS[route.path] == "public":
                    assert response.status_code != 401
                    continue
                assert_error(response, 401, "invalid_api_key")
                assert response.headers["www-authenticate"] == "Bearer"
                assert response.headers["x-should-retry"] == "false"

    run(proxy, test)


def test_a_key_opens_the_routes_of_its_scope_and_no_others(tmp_path, keys):
    file, secrets = keys
    proxy = Proxy(tmp_path, keys_file=str(file))

    async def test(client):
        for route in proxy.app.router.routes:
            need = NEEDS[route.path]
            for scope, secret in secrets.items():
                method = "GET" if "GET" in route.methods else "POST"
                response = await client.request(method, filled(route.path), headers=bearer(secret))
                if need in ("public", scope):
                    assert response.status_code not in (401, 403), (route.path, scope)
                else:
                    assert_error(response, 403, "permission_denied")

    run(proxy, test)


@pytest.mark.parametrize(
    "path",
    [
        "//v1/models",
        "/v1//models",
        "/v1/models/",
        "/v1/./models",
        "/health/../v1/models",
        "/health/..%2fv1/models",
        "/%76%31/models",
        "/V1/MODELS",
        "/v1/models%00",
        "/v1/models;x=/health",
        "/admin/decisions?x=/health",
        "/health/x",
        "/health%2f..%2fadmin%2fdecisions",
        "/static",
        "/nothing",
        "/admin",
    ],
)
def test_no_spelling_of_a_path_gets_by(tmp_path, keys, path):
    proxy = Proxy(tmp_path, keys_file=str(keys[0]))

    async def test(client):
        for method in METHODS:
            # As it stands: the client's own tidying would hide what is asked.
            url = httpx.URL("http://127.0.0.1").copy_with(raw_path=path.encode())
            assert_error(await client.request(method, url), 401, "invalid_api_key")

    run(proxy, test)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        "Basic {}",
        "{}",
        "Bearer x{}",
        "Bearer {}x",
        "Bearer " + "a" * 100_000,
        "Bearer \xff\xfe",
        "Bearer {} {}",
    ],
)
def test_what_is_no_key_is_none(tmp_path, keys, header):
    file, secrets = keys
    proxy = Proxy(tmp_path, keys_file=str(file))
    text = header.format(secrets["inference"], "y").encode("latin-1")

    async def test(client):
        response = await client.get("/v1/models", headers={"Authorization": text})
        assert_error(response, 401, "invalid_api_key")
        assert secrets["inference"] not in response.text

    run(proxy, test)


def test_a_key_answers_chats_and_sees_its_own_models(tmp_path, keys):
    file, secrets = keys
    proxy = Proxy(tmp_path, keys_file=str(file))
    narrow = create_key(file, checked_key({"name": "narrow", "models": ["org/other"]}))

    async def test(client):
        await asyncio.sleep(2 * LOOK_S)
        wide = bearer(secrets["inference"])
        assert (
            await client.post("/v1/chat/completions", json=CHAT, headers=wide)
        ).status_code == 200
        listed = (await client.get("/v1/models", headers=bearer(narrow))).json()["data"]
        assert [card["id"] for card in listed] == ["org/other"]
        for path, body in (
            ("/v1/chat/completions", CHAT),
            ("/v1/completions", {"model": "m", "prompt": "x"}),
        ):
            refused = await client.post(path, json=body, headers=bearer(narrow))
            assert_error(refused, 403, "permission_denied")
            assert refused.json()["error"]["param"] == "model"
        assert_error(
            await client.get("/v1/models/m", headers=bearer(narrow)), 403, "permission_denied"
        )
        own = await client.post(
            "/v1/chat/completions", json={**CHAT, "model": "org/other"}, headers=bearer(narrow)
        )
        assert own.status_code == 200

    run(proxy, test)


def test_a_revoked_key_is_let_in_no_more_and_a_broken_file_changes_nothing(tmp_path, keys):
    file, secrets = keys
    proxy = Proxy(tmp_path, keys_file=str(file))

    async def test(client):
        async def status():
            await asyncio.sleep(2.5 * LOOK_S)
            return (
                await client.get("/v1/models", headers=bearer(secrets["inference"]))
            ).status_code

        whole = file.read_text()
        file.write_text(whole[:-20])
        assert await status() == 200
        file.unlink()
        assert await status() == 200
        file.write_text(whole)
        revoke_key(file, "only-inference")
        assert await status() == 401

    run(proxy, test)


def test_health_tells_strangers_only_whether_it_is_well(tmp_path, keys):
    file, secrets = keys
    proxy = Proxy(tmp_path, keys_file=str(file))

    async def test(client):
        stranger = (await client.get("/health")).json()
        known = (await client.get("/health", headers=bearer(secrets["metrics"]))).json()
        assert (stranger["status"], stranger["instances"]) == ("ok", [])
        assert known["instances"]

    run(proxy, test)


@pytest.mark.parametrize(
    ("headers", "client", "status"),
    [
        ({}, "127.0.0.1", 200),
        ({}, "::1", 200),
        ({}, "::ffff:127.0.0.1", 200),
        ({"Host": "localhost:8080"}, "127.0.0.1", 200),
        ({"Host": "localhost:8080", "Origin": "http://localhost:8080"}, "127.0.0.1", 200),
        ({}, "10.0.0.9", 403),
        ({}, "::ffff:10.0.0.9", 403),
        ({}, "testclient", 403),
        ({"X-Forwarded-For": "127.0.0.1"}, "127.0.0.1", 403),
        ({"Origin": "https://elsewhere.example"}, "127.0.0.1", 403),
        ({"Origin": "null"}, "127.0.0.1", 403),
        ({"Host": "elsewhere.example"}, "127.0.0.1", 403),
        ({"Host": "localhost.elsewhere.example"}, "127.0.0.1", 403),
        ({"Host": "["}, "127.0.0.1", 403),
    ],
)
def test_without_keys_only_programs_of_this_machine_administer(tmp_path, headers, client, status):
    is_foreign = "elsewhere" in str(headers) or headers.get("Origin") == "null"
    is_foreign |= headers.get("Host") == "["
    proxy = Proxy(tmp_path)

    async def test():
        async with proxy.app.router.lifespan_context(proxy.app):
            transport = httpx.ASGITransport(proxy.app, client=(client, 4000))
            async with httpx.AsyncClient(
                transport=transport, base_url="http://127.0.0.1"
            ) as caller:
                response = await caller.get("/admin/decisions", headers=headers)
                models = await caller.get("/v1/models", headers=headers)
                assert response.status_code == status
                assert models.status_code == (403 if is_foreign else 200)

    proxy.add_instance()
    try:
        asyncio.run(asyncio.wait_for(test(), 60))
    finally:
        proxy.stop_instances()


@pytest.mark.parametrize(
    ("server", "settings", "headers", "status"),
    [
        ("127.0.0.1", {}, {}, 200),
        ("127.0.0.1", {}, {"Origin": "http://127.0.0.1"}, 200),
        ("127.0.0.1", {}, {"Origin": "https://elsewhere.example"}, 403),
        ("127.0.0.1", {}, {"Host": "elsewhere.example"}, 403),  # a name made to lead here
        ("127.0.0.1", {}, {"Host": "elsewhere.example", "Origin": "http://elsewhere.example"}, 403),
        ("127.0.0.1", {"host": "0.0.0.0"}, {"Host": "myself.lan"}, 200),
        ("10.0.0.9", {}, {"Host": "myself.lan", "Origin": "http://myself.lan"}, 200),
        ("10.0.0.9", {}, {"Host": "myself.lan", "Origin": "http://elsewhere.example"}, 403),
    ],
)
def test_without_keys_other_sites_pages_get_no_answers(tmp_path, server, settings, headers, status):
    proxy = Proxy(tmp_path, **settings)

    async def test(client):
        url = f"http://{server}/v1/chat/completions"
        return await client.post(url, json=CHAT, headers=headers)

    response = run(proxy, test)
    assert response.status_code == status
    assert len(proxy.instance.submitted) == (status == 200)


def test_a_key_is_good_from_any_page_and_under_any_name(tmp_path, keys):
    file, secrets = keys
    headers = {"Host": "elsewhere.example", "Origin": "https://page.example"}
    headers |= bearer(secrets["inference"])

    async def test(client):
        return await client.post("/v1/chat/completions", json=CHAT, headers=headers)

    assert run(Proxy(tmp_path, keys_file=str(file)), test).status_code == 200


def test_an_application_that_was_not_started_lets_nobody_in(tmp_path):
    async def test():
        transport = httpx.ASGITransport(Proxy(tmp_path).app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            response = await client.get("/v1/models")
        assert response.status_code == 500
        assert json.loads(response.text)["error"]["code"] == "internal_error"

    asyncio.run(test())


def test_websockets_and_other_origins_are_turned_away(tmp_path):
    proxy = Proxy(tmp_path)
    client = TestClient(proxy.app)
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/models"):
        pass

    async def test(client):
        asked = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
        response = await client.options("/v1/chat/completions", headers=asked)
        listed = await client.get("/v1/models", headers=asked)
        for one in (response, listed):
            assert_error(one, 403, "permission_denied")
            assert not any(name.startswith("access-control") for name in one.headers)

    run(proxy, test)


def test_nobody_may_do_what_is_not_in_the_table():
    key = checked_key({"name": "all", "scopes": list(SCOPES)})
    assert all(Caller(key).may(need) for need in NEEDS.values())
    assert not Caller(key).may("other")
    assert not any(Caller().may(scope) for scope in SCOPES)


def test_devices_are_shared_by_the_keys_that_ask(tmp_path):
    file = tmp_path / "keys.json"
    given = {"name": "batch", "scopes": ["inference"], "weight": 0.5}
    secret = create_key(file, checked_key(given))
    proxy = Proxy(tmp_path, keys_file=str(file))

    async def test(client):
        asked = {**CHAT, "n": 2, "stream": True}
        return await client.post("/v1/chat/completions", json=asked, headers=bearer(secret))

    assert run(proxy, test).status_code == 200
    assert [(r.key, r.weight) for r in proxy.instance.submitted] == [("batch", 0.5)] * 2


def test_a_key_that_is_taken_out_ends_no_answer_that_runs(tmp_path):
    file = tmp_path / "keys.json"
    secrets = {name: create_key(file, checked_key({"name": name})) for name in ("gone", "stays")}
    proxy = Proxy(tmp_path, keys_file=str(file))

    async def test(client):
        proxy.instance.hold_after = 2
        asked = {"json": {**CHAT, "stream": True}, "headers": bearer(secrets["gone"])}
        answer = asyncio.ensure_future(client.post("/v1/chat/completions", **asked))
        while not proxy.instance.submitted:
            await asyncio.sleep(0.01)
        revoke_key(file, "gone")
        while (await client.get("/v1/models", headers=asked["headers"])).status_code != 401:
            await asyncio.sleep(0.05)
        assert not answer.done()
        proxy.instance.release()
        assert (await answer).text.endswith("data: [DONE]\n\n")
        assert '"finish_reason":"' in answer.result().text
        assert (await client.post("/v1/chat/completions", **asked)).status_code == 401
        other = await client.get("/v1/models", headers=bearer(secrets["stays"]))
        assert other.status_code == 200

    run(proxy, test)
