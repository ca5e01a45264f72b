"""Models come and go while a real server answers: streams go on, restarts know, nothing is lost."""

import os
import shutil
import signal
import time

import httpx
import pytest

from tests.support.checkpoints import make_checkpoint
from tests.support.polling import eventually
from tests.support.server import Server, Streamed

PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def models_dir(checkpoints, tmp_path_factory):
    """A models directory with bob and cleo, of other shapes than ada, which is served at first."""
    root = tmp_path_factory.mktemp("models")
    for name in ("bob", "cleo"):
        shutil.copytree(checkpoints[name], root / name)
    return root


@pytest.fixture(scope="module", params=["cpu", pytest.param("staged", marks=pytest.mark.thorough)])
def server(request, checkpoints, models_dir, tmp_path_factory):
    flags = ["--colocated-count", "2", "--models-dir", str(models_dir), "--lease-s", "3"]
    flags += ["--device", request.param, "--model-cache-budget-gb", "0.1", "--kv-budget-gb", "0.05"]
    if request.param == "staged":
        flags += ["--device-memory-gb", "0.08"]
    directory = tmp_path_factory.mktemp("server")
    with Server(directory, {"ada": checkpoints["ada"]}, *flags) as server:
        yield server


def call(server, method, path, **options):
    return httpx.request(method, server.url + path, timeout=60, **options)


def ids(server):
    return [card["id"] for card in call(server, "GET", "/v1/models").json()["data"]]


def test_a_model_that_is_added_answers_as_if_it_had_always_been_there(
    server, checkpoints, tmp_path
):
    with Server(tmp_path, {"bob": checkpoints["bob"]}) as other:
        expected = Streamed(other.url, "bob", PROMPT, 60).whole()
    running = Streamed(server.url, "ada", PROMPT, 600)
    added = call(server, "POST", "/admin/models", json={"reference": "bob", "aliases": ["robert"]})
    assert (added.status_code, added.json()["status"]) == (201, "served")
    assert ids(server) == ["ada", "bob"]
    assert Streamed(server.url, "bob", PROMPT, 60).whole() == expected
    assert Streamed(server.url, "robert", PROMPT, 60).whole() == expected
    assert len(running.whole()) > 0
    again = call(server, "POST", "/admin/models", json={"reference": "bob"})
    assert (again.status_code, again.json()["error"]["code"]) == (409, "model_exists")


def test_instances_and_proxies_that_restart_know_what_was_added(server):
    answer = Streamed(server.url, "bob", PROMPT, 40).whole()
    for pid in (*server.instance_pids().values(), server.proxy_pid()):
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.5)

    def is_back():
        try:
            health = call(server, "GET", "/health").json()
            return [one["state"] for one in health["instances"]] == ["ready", "ready"]
        except httpx.HTTPError:
            return False

    eventually(is_back, 60)
    assert ids(server) == ["ada", "bob"]
    assert Streamed(server.url, "bob", PROMPT, 40).whole() == answer


def test_a_model_that_is_removed_ends_its_streams_first_and_may_come_again(server):
    whole = Streamed(server.url, "bob", PROMPT, 900).whole()
    running = Streamed(server.url, "bob", PROMPT, 900)
    eventually(lambda: running.times_s, 30)
    removed = call(server, "DELETE", "/admin/models/bob")
    assert (removed.status_code, removed.json()["status"]) == (202, "draining")

    def answer():
        return call(
            server, "POST", "/v1/completions", json={"model": "bob", "prompt": "x", "max_tokens": 1}
        )

    eventually(lambda: answer().status_code != 200, 10)
    refused = answer()
    assert refused.json()["error"]["code"] == "model_not_found"
    assert call(server, "POST", "/admin/models/bob/pin").status_code in (404, 409)
    assert running.whole() == whole
    eventually(lambda: ids(server) == ["ada"], 20)
    assert answer().json()["error"]["code"] == "model_not_found"
    added = call(server, "POST", "/admin/models", json={"reference": "bob"})
    assert added.status_code == 201, added.text
    assert Streamed(server.url, "bob", PROMPT, 900).whole() == whole
    call(server, "DELETE", "/admin/models/bob")
    eventually(lambda: ids(server) == ["ada"], 20)


def test_a_pinned_model_stays_and_what_cannot_be_is_refused_with_numbers(server, models_dir):
    added = call(server, "POST", "/admin/models", json={"reference": "cleo", "pinned": True})
    assert added.status_code == 201, added.text

    def statuses():
        cards = call(server, "GET", "/v1/models").json()["data"]
        return {card["id"]: (card["status"], card["pinned"]) for card in cards}

    eventually(lambda: statuses()["cleo"] == ("resident", True), 30)
    assert call(server, "POST", "/admin/models/cleo/unpin").status_code == 200
    eventually(lambda: statuses()["cleo"][1] is False, 10)
    # Larger than slabs that were cut for small models, and not there when the server started.
    make_checkpoint(models_dir / "wide", "llama", num_hidden_layers=48, head_dim=128)
    refused = call(server, "POST", "/admin/models", json={"reference": "wide"})
    assert refused.status_code == 409, refused.text
    error = refused.json()["error"]
    assert error["code"] == "model_refused" and "bytes" in error["message"]
    assert "wide" not in ids(server)
    missing = call(server, "POST", "/admin/models", json={"reference": "nowhere"})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    call(server, "DELETE", "/admin/models/cleo")
    eventually(lambda: ids(server) == ["ada"], 20)
    assert Streamed(server.url, "ada", PROMPT, 20).whole()
