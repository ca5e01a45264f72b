"""The routes that change models, and how a proxy follows the catalogue, over scripted instances."""

import asyncio
import json
import logging
import shutil

import msgspec
import pytest
from tokenizers import Tokenizer

from aegaeon.keeper import bounds_of
from aegaeon.proxy import models as changes
from tests.support.checkpoints import make_checkpoint
from tests.support.proxy_server import Proxy, in_memory, write_text_model

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
PATH = "/v1/chat/completions"


@pytest.fixture
def proxy(tmp_path, monkeypatch):
    monkeypatch.setattr(changes, "SETTLE_S", 1.0)
    make_checkpoint(tmp_path / "models" / "new", "llama")
    return Proxy(tmp_path, models_dir=str(tmp_path / "models"))


def run(proxy, test):
    async def whole():
        async with in_memory(proxy) as client:
            proxy.catalog = proxy.domain.catalog()
            proxy.catalog.change(lambda _: msgspec.structs.replace(_, models=proxy.specs))
            await until(lambda: proxy.service.catalog.version == 1)
            return await test(client)

    return asyncio.run(asyncio.wait_for(whole(), 60))


async def until(claim):
    for _ in range(400):
        if claim():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not happen")


async def answered(proxy, call, **status):
    """Let the instance follow the catalogue while `call` runs, with `status`."""
    before = proxy.catalog.read().version
    task = asyncio.ensure_future(call)
    await until(lambda: proxy.catalog.read().version > before or task.done())
    proxy.instance.serve(*(spec.id for spec in proxy.catalog.read().models))
    proxy.instance.publish(catalog=before + 1, **status)
    return await task


def code(response):
    return response.status_code, response.json()["error"]["code"]


def test_a_model_is_added_under_all_its_names(proxy):
    async def test(client):
        body = {"reference": "new", "id": "org/n", "aliases": ["x"], "slo_ttft_s": 2}
        body |= {"priority": "high", "idle_s": 30}
        response = await answered(proxy, client.post("/admin/models", json=body))
        assert (response.status_code, response.json()["status"]) == (201, "served")
        card = (await client.get("/v1/models/x")).json()
        assert (card["id"], card["aliases"], card["status"]) == ("org/n", ["x"], "idle")
        assert (card["priority"], card["idle_s"]) == ("high", 30.0)
        spec = proxy.catalog.read().find("x")
        assert spec.slo_ttft_s == 2.0 and spec.path.endswith("/models/new")
        assert str(spec.path) not in (await client.get("/v1/models")).text
        taken = await client.post("/admin/models", json={"reference": "new", "id": "x"})
        assert code(taken) == (409, "model_exists")
        assert taken.headers["x-should-retry"] == "false"  # it stays so

    run(proxy, test)


def test_an_instance_that_has_not_followed_yet_leaves_it_pending(proxy):
    async def test(client):
        response = await client.post("/admin/models", json={"reference": "new"})
        assert (response.status_code, response.json()["status"]) == (201, "pending")

    run(proxy, test)


def test_what_an_instance_refuses_is_taken_back_with_its_reason(proxy, tmp_path):
    async def test(client):
        for why, told in (
            ("needs 3 GB, there are 2 GB", "needs 3 GB, there are 2 GB"),
            (f"cannot read {tmp_path}/models/new", "an instance cannot serve it"),
        ):
            call = client.post("/admin/models", json={"reference": "new"})
            response = await answered(proxy, call, refused={"new": why})
            assert code(response) == (409, "model_refused")
            assert told in response.text and str(tmp_path) not in response.text
            assert proxy.catalog.read().find("new") is None
            proxy.instance.publish()
            await asyncio.sleep(0.3)

    run(proxy, test)


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        ({"reference": "../models/new"}, (400, "invalid_value")),
        ({"reference": "/etc"}, (400, "invalid_value")),
        ({"reference": "~"}, (400, "invalid_value")),
        ({"reference": "models/new"}, (404, "model_not_found")),
        ({"reference": "missing"}, (404, "model_not_found")),
        ({"reference": "new", "id": "m"}, (409, "model_exists")),
        ({"reference": "new", "aliases": ["m"]}, (409, "model_exists")),
        ({"reference": "new", "aliases": ["new"]}, (400, "invalid_value")),
        ({"reference": "new", "id": "z", "aliases": ["y", "y"]}, (400, "invalid_value")),
        ({"reference": "new", "id": "x" * 201}, (400, "invalid_value")),
        ({"reference": "new", "id": "a\nb"}, (400, "invalid_value")),
        ({"reference": "new", "path": "/x"}, (400, "invalid_value")),
        ({"reference": "new", "priority": "urgent"}, (400, "invalid_value")),
        ({"reference": "new", "idle_s": -1}, (400, "invalid_value")),
        ({"reference": 1}, (400, "invalid_value")),
        ({}, (400, "invalid_value")),
        ([], (400, "invalid_value")),
    ],
)
def test_what_cannot_be_added_changes_nothing(proxy, body, answer, tmp_path):
    async def test(client):
        response = await client.post("/admin/models", json=body)
        assert code(response) == answer
        assert str(tmp_path) not in response.text
        assert proxy.catalog.read().version == 1

    run(proxy, test)


def test_a_damaged_model_is_refused_without_its_path(proxy, tmp_path):
    shutil.copytree(tmp_path / "models" / "new", tmp_path / "models" / "bad")
    (tmp_path / "models" / "bad" / "model.safetensors").write_bytes(b"x")

    async def test(client):
        response = await client.post("/admin/models", json={"reference": "bad"})
        assert code(response) == (409, "model_refused") and str(tmp_path) not in response.text

    run(proxy, test)


NO_TOKENS = '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}'


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", NO_TOKENS),
        ("tokenizer_config.json", "["),
        ("tokenizer_config.json", '{"chat_template": "{% for %}"}'),
        ("chat_template.jinja", "{{ messages[0"),
        ("generation_config.json", '{"temperature": "hot"}'),
    ],
)
def test_a_model_whose_text_side_is_damaged_is_refused(proxy, tmp_path, file, text):
    shutil.copytree(tmp_path / "models" / "new", tmp_path / "models" / "bad")
    (tmp_path / "models" / "bad" / file).write_text(text)

    async def test(client):
        response = await client.post("/admin/models", json={"reference": "bad"})
        assert code(response) == (409, "model_refused") and str(tmp_path) not in response.text
        assert proxy.catalog.read().version == 1

    run(proxy, test)


def test_a_template_that_refuses_our_words_is_no_reason_to_refuse_the_model(proxy, tmp_path):
    template = "{{ raise_exception('no') }}"
    (tmp_path / "models" / "new" / "chat_template.jinja").write_text(template)

    async def test(client):
        response = await answered(proxy, client.post("/admin/models", json={"reference": "new"}))
        assert response.status_code == 201

    run(proxy, test)


def test_a_model_that_drains_takes_no_new_requests_and_ends_its_open_ones(proxy):
    async def test(client):
        proxy.instance.hold_after = 1
        body = {**CHAT, "model": "org/other"}
        running = asyncio.ensure_future(client.post(PATH, json=body))
        await until(lambda: proxy.service.gateway.open_requests == 1)
        response = await client.delete("/admin/models/org/other")
        assert (response.status_code, response.json()["status"]) == (202, "draining")
        refused = await client.post(PATH, json=body)
        # It is a wait for nothing: the model will not come back.
        assert code(refused) == (404, "model_not_found")
        assert refused.headers["x-should-retry"] == "false"
        assert refused.json()["error"]["param"] == "model"
        for verb in ("pin", "load"):
            response = await client.post(f"/admin/models/org/other/{verb}")
            assert code(response) == (409, "model_draining")
        assert not proxy.catalog.read().find("org/other").is_pinned
        assert (await client.get("/v1/models/org/other")).json()["status"] == "draining"
        proxy.catalog.change(lambda catalog: catalog.without_model("org/other"))
        await until(lambda: proxy.service.catalog.find("org/other") is None)
        assert code(await client.post(PATH, json=body)) == (404, "model_not_found")
        proxy.instance.release()
        assert (await running).status_code == 200
        assert (await client.post(PATH, json=CHAT)).status_code == 200
        assert code(await client.delete("/admin/models/zzz")) == (404, "model_not_found")

    run(proxy, test)


def test_pins_are_told_and_one_that_does_not_fit_is_taken_back(proxy):
    async def test(client):
        pinned = await answered(proxy, client.post("/admin/models/m/pin"))
        assert pinned.json()["status"] == "pinned"
        assert (await client.get("/v1/models/m")).json()["pinned"]
        call = client.post("/admin/models/org/other/pin")
        refused = await answered(proxy, call, refused={"org/other": "pin fewer"})
        assert code(refused) == (409, "model_refused") and "pin fewer" in refused.text
        assert not proxy.catalog.read().find("org/other").is_pinned
        proxy.instance.publish()
        unpinned = await answered(proxy, client.post("/admin/models/m/unpin"))
        assert unpinned.json()["status"] == "unpinned"

    run(proxy, test)


def test_a_pin_that_is_refused_leaves_what_was_before_or_what_came_since(proxy):
    async def test(client):
        no = {"refused": {"m": "pin fewer"}}

        async def change(**values):
            spec = msgspec.structs.replace(proxy.catalog.read().find("m"), **values)
            await asyncio.to_thread(proxy.catalog.change, lambda one: one.with_model(spec))
            version = proxy.catalog.read().version
            await until(lambda: proxy.service.catalog.version == version)

        await change(is_pinned=True)
        proxy.instance.publish(catalog=proxy.catalog.read().version, **no)
        await asyncio.sleep(0.3)
        assert code(await client.post("/admin/models/m/pin")) == (409, "model_refused")
        assert proxy.catalog.read().find("m").is_pinned
        # An end of pinning is refused by nobody.
        assert (
            await answered(proxy, client.post("/admin/models/m/unpin"), **no)
        ).status_code == 200
        assert not proxy.catalog.read().find("m").is_pinned
        pinning = asyncio.ensure_future(client.post("/admin/models/m/pin"))
        await until(lambda: proxy.catalog.read().find("m").is_pinned)
        await change(priority="high")
        proxy.instance.publish(catalog=proxy.catalog.read().version, **no)
        assert code(await pinning) == (409, "model_refused")
        kept = proxy.catalog.read().find("m")
        assert (kept.is_pinned, kept.priority) == (True, "high")

    run(proxy, test)


def test_a_load_goes_to_an_instance_unless_the_model_is_there(proxy):
    async def test(client):
        response = await client.post("/admin/models/m/load")
        assert (response.status_code, response.json()["status"]) == (202, "loading")
        await until(lambda: proxy.instance.preloaded == ["m"])
        proxy.instance.publish(resident=("m",))
        await until(lambda: "m" in proxy.service.gateway.instances()[0].status.resident)
        assert (await client.post("/admin/models/m/load")).json()["status"] == "resident"
        assert code(await client.post("/admin/models/zzz/load")) == (404, "model_not_found")

    run(proxy, test)


def test_bounds_and_complaints_come_with_the_catalogue(proxy, root_level):
    async def test(client):
        settings = proxy.service.settings
        changed = {
            "max_body_bytes": 2000,
            "slo_ttft_s": 3.5,
            "max_waiting": 2,
            "log_level": "error",
        }
        bounds = bounds_of(msgspec.structs.replace(settings, **changed))
        proxy.catalog.change(
            lambda before: msgspec.structs.replace(before, bounds=bounds, complaint="so")
        )
        await until(lambda: proxy.service.catalog.bounds == bounds)
        long = {**CHAT, "user": "x" * 3000}
        assert (await client.post(PATH, json=long)).status_code == 413
        assert (await client.get("/health")).json()["complaint"] == "so"
        status = (await client.get("/admin/status")).json()
        assert status["slo_ttft_s"] == status["models"][0]["slo_ttft_s"] == 3.5
        many = await client.post(PATH, json={**CHAT, "n": 3})
        assert many.status_code == 400
        assert "at most 2" in many.json()["error"]["message"]
        assert logging.getLogger().level == logging.ERROR

    run(proxy, test)


def test_a_model_under_an_old_name_is_read_by_its_own_tokenizer(proxy, tmp_path):
    async def test(client):
        body = {"model": "m", "messages": CHAT["messages"]}
        before = (await client.post("/tokenize", json=body)).json()["tokens"]
        other = write_text_model(tmp_path / "other", template="another one")
        spec = msgspec.structs.replace(proxy.specs[0], path=str(other))
        proxy.catalog.change(lambda catalog: catalog.with_model(spec))
        await until(lambda: proxy.service.catalog.find("m").path == str(other))
        return before, (await client.post("/tokenize", json=body)).json()["tokens"]

    before, after = run(proxy, test)
    assert before != after == list(proxy.text.encode("another one", False))


def test_one_whose_tokenizer_is_of_another_model_is_refused(proxy, tmp_path):
    file = tmp_path / "models" / "new" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"]["beyond"] = 384
    file.write_text(json.dumps(tokenizer))

    async def test(client):
        response = await client.post("/admin/models", json={"reference": "new"})
        assert code(response) == (409, "model_refused")
        assert "checkpoint_error" in response.json()["error"]["message"]
        assert proxy.catalog.read().find("new") is None

    run(proxy, test)


def test_a_pin_whose_load_fails_says_so(proxy):
    async def test(client):
        why = {"failed": {"m": "the file is cut short"}}
        pinned = (await answered(proxy, client.post("/admin/models/m/pin"), **why)).json()
        assert (pinned["status"], pinned["load"]) == ("pinned", "failed")
        assert pinned["reason"] == "the file is cut short"
        ready = (await client.get("/health/ready")).json()
        assert any("pinned model m" in reason for reason in ready["reasons"])
        (model, _) = (await client.get("/admin/status")).json()["models"]
        assert "the server's log" in model["failure"]

    run(proxy, test)


def test_a_prompt_with_an_added_token_without_weights_is_refused(proxy, tmp_path):
    file = tmp_path / "models" / "new" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens(["<pad>"])
    assert tokenizer.token_to_id("<pad>") == 384
    tokenizer.save(str(file))

    async def test(client):
        response = await answered(proxy, client.post("/admin/models", json={"reference": "new"}))
        assert response.status_code == 201
        bad = await client.post("/v1/completions", json={"model": "new", "prompt": "a<pad>b"})
        assert code(bad) == (400, "invalid_value")
        assert "token id 384" in bad.json()["error"]["message"]

    run(proxy, test)


def test_more_models_than_instances_can_tell_of_are_refused_with_the_remedy(proxy):
    spec = proxy.specs[0]
    many = tuple(msgspec.structs.replace(spec, id=f"{'m' * 195}{n:05d}") for n in range(430))

    async def test(client):
        proxy.catalog.change(lambda _: msgspec.structs.replace(_, models=many))
        await until(lambda: proxy.service.catalog.version == 2)
        for number in range(40):
            body = {"reference": "new", "id": f"{'a' * 195}{number:05d}"}
            response = await answered(proxy, client.post("/admin/models", json=body))
            if response.status_code != 201:
                break
        assert code(response) == (409, "model_refused")
        assert "shorter ids" in response.json()["error"]["message"]
        assert len(proxy.catalog.read().models) == 430 + number

    run(proxy, test)


def test_cards_tell_the_tier_and_how_much_of_a_load_is_in(proxy):
    async def test(client):
        proxy.instance.publish(resident=("m",), loading="org/other", coming=0.25)
        await until(lambda: proxy.service.gateway.instances()[0].status.loading)
        cards = {one["id"]: one for one in (await client.get("/v1/models")).json()["data"]}
        assert (cards["m"]["status"], cards["m"]["tier"]) == ("resident", "device")
        assert cards["m"]["progress"] is None
        other = (await client.get("/v1/models/org/other")).json()
        assert other == cards["org/other"]
        assert (other["status"], other["tier"], other["progress"]) == ("loading", "disk", 0.25)

    run(proxy, test)
