"""Nothing of the inside leaves the server: no traceback, no path of its machine."""

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.proxy_server import Proxy, in_memory

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
PATHS = ("/v1/chat/completions", "/v1/completions")
BODIES = (CHAT, {**CHAT, "stream": True}, {"model": "m", "prompt": "x"})


def run(proxy, test):
    async def whole():
        async with in_memory(proxy) as client:
            return await test(client)

    return asyncio.run(asyncio.wait_for(whole(), 60))


def assert_silent(text, directory):
    for inside in ("Traceback", 'File "', ".py", "site-packages", str(directory)):
        assert inside not in text


@pytest.mark.parametrize("code", ["checkpoint_error", "internal_error", "region_error", "odd"])
def test_an_instances_trouble_is_told_without_its_files(tmp_path, code):
    proxy = Proxy(tmp_path)

    async def test(client):
        proxy.instance.fail_with = (code, f"cannot read {tmp_path}/m/model.safetensors")
        for body in BODIES:
            path = PATHS["prompt" in body]
            assert_silent((await client.post(path, json=body)).text, tmp_path)

    run(proxy, test)


def test_a_fault_of_ours_is_told_without_its_place(tmp_path, monkeypatch):
    proxy = Proxy(tmp_path)

    async def test(client):
        def fault(*_):
            raise RuntimeError(f"{tmp_path}/secret")

        monkeypatch.setattr(proxy.service, "choices", fault)
        monkeypatch.setattr(proxy.service, "models", fault)
        for body in BODIES:
            response = await client.post(PATHS["prompt" in body], json=body)
            assert (response.status_code, response.json()["error"]["code"]) == (
                500,
                "internal_error",
            )
            assert_silent(response.text, tmp_path)
        assert_silent((await client.get("/v1/models")).text, tmp_path)

    run(proxy, test)


@pytest.mark.parametrize("broken", ["tokenizer.json", "tokenizer_config.json", "chat_template"])
def test_a_damaged_model_is_told_without_its_path(tmp_path, broken):
    proxy = Proxy(tmp_path)
    if broken == "chat_template":
        (tmp_path / "m" / "chat_template.jinja").write_text("{% for %}")
    else:
        (tmp_path / "m" / broken).write_text("{")

    async def test(client):
        response = await client.post(PATHS[0], json=CHAT)
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "checkpoint_error"
        assert_silent(response.text, tmp_path)

    run(proxy, test)


def test_models_are_names_and_never_paths(tmp_path):
    proxy = Proxy(tmp_path)
    names = [str(tmp_path / "m"), "./m", "m/", "../m", "m\0", "file://m", "%6d", "M", ""]

    async def test(client):
        for name in names:
            response = await client.post(PATHS[0], json={**CHAT, "model": name})
            assert (response.status_code, response.json()["error"]["code"]) == (
                404,
                "model_not_found",
            )
        for card in (await client.get("/v1/models")).json()["data"]:
            assert_silent(str(card), tmp_path)

    run(proxy, test)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "function", "name", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
FIELDS = (
    *("messages", "prompt", "stop", "n", "tools", "tool_choice", "response_format", "logit_bias"),
    *("temperature", "seed", "stream", "stream_options", "chat_template_kwargs", "metadata"),
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(PATHS), st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
def test_no_body_makes_a_fault_or_tells_of_one(tmp_path_factory, path, change):
    directory = tmp_path_factory.mktemp("model")
    base = {"model": "m", "max_tokens": 4}
    base |= {"prompt": "x"} if path == PATHS[1] else {"messages": CHAT["messages"]}

    async def test(client):
        return await client.post(path, json={**base, **change})

    response = run(Proxy(directory), test)
    assert response.status_code < 500, response.text
    assert_silent(response.text, directory)
