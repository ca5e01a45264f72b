"""A request whose computing ends its instance, each time: it is given up soon, and nobody else."""

import re
import textwrap

import httpx
import pytest

from tests.support.redis_server import RedisServer, require_redis
from tests.support.server import ROOT, Server, Streamed

TOKENS = 120
POISON = 77  # a prompt that has this token is one
FLAGS = ("--colocated-count", "2", "--request-timeout-s", "100")


def poisoned(directory, way):
    """Have instances end, in a `way`, in a step that computes a prompt with POISON. Returns the
    environment in which they do."""
    (directory / "sitecustomize.py").write_text(
        textwrap.dedent(f"""
            import os, sys
            if "aegaeon.instance.worker" in sys.orig_argv:
                from aegaeon.engine import engine
                build_batch = engine.build_batch
                def die_of_it(parts, pool):
                    if any({POISON} in part.sequence.request.prompt_token_ids for part in parts):
                        {way}
                    return build_batch(parts, pool)
                engine.build_batch = die_of_it
            if "serve" in sys.orig_argv:
                from aegaeon import child
                child.BACKOFF_S = (0.0,)
            """)
    )
    return {"PYTHONPATH": f"{directory}:{ROOT}"}


def ask_poison(server, model):
    body = {"model": model, "prompt": [5, POISON, 9], "max_tokens": 50, "temperature": 0}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=90)


def assert_given_up_alone(server, checkpoints, undisturbed):
    """Ask something of all models, and the poison among it."""
    streams = [
        Streamed(server.url, model, "the device", TOKENS) for model in checkpoints for _ in range(3)
    ]
    answer = ask_poison(server, "bob")
    assert answer.status_code == 503, answer.text
    error = answer.json()["error"]
    assert error["code"] == "instance_lost"
    assert answer.headers["x-should-retry"] == "false" and "retry-after" not in answer.headers
    assert re.match("[45] instances ended while they computed this request", error["message"])
    assert [stream.whole() for stream in streams] == [
        undisturbed[s._body["model"]] for s in streams
    ]
    deaths = server.log.read_bytes().count(b"died name=instance-")
    assert 4 <= deaths <= 5, server.log.read_text()


@pytest.mark.parametrize(
    "way",
    [
        "os.kill(os.getpid(), 11)",
        pytest.param("raise ValueError('a bad step')", marks=pytest.mark.thorough),
    ],
)
def test_a_request_that_ends_instances_is_given_up_and_its_mates_go_on(checkpoints, tmp_path, way):
    with Server(tmp_path, checkpoints, *FLAGS, environment=poisoned(tmp_path, way)) as server:
        whole = {m: Streamed(server.url, m, "the device", TOKENS).whole() for m in checkpoints}
        assert_given_up_alone(server, checkpoints, whole)


@pytest.mark.thorough
def test_one_at_which_the_loop_of_its_instance_stands_is_given_up_as_soon(checkpoints, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent(f"""
            import os, sys, time
            if "aegaeon.instance.worker" in sys.orig_argv:
                from aegaeon.engine.engine import ModelEngine
                submit = ModelEngine.submit
                def stand_still(self, request):
                    if {POISON} in request.prompt_token_ids:
                        time.sleep(3600)
                    return submit(self, request)
                ModelEngine.submit = stand_still
            if "serve" in sys.orig_argv:
                from aegaeon import child
                child.BACKOFF_S = (0.0,)
            """)
    )
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    flags = (*FLAGS, "--lease-s", "2")
    with Server(tmp_path, checkpoints, *flags, environment=environment) as server:
        whole = {m: Streamed(server.url, m, "the device", TOKENS).whole() for m in checkpoints}
        assert_given_up_alone(server, checkpoints, whole)


@pytest.mark.thorough
def test_it_is_given_up_over_redis_too(checkpoints, tmp_path):
    require_redis()
    redis = RedisServer(tmp_path)
    redis.start()
    try:
        flags = (*FLAGS, "--metadata-backend", "redis", "--redis-url", redis.url)
        environment = poisoned(tmp_path, "os.kill(os.getpid(), 9)")
        with Server(tmp_path, checkpoints, *flags, environment=environment) as server:
            whole = {m: Streamed(server.url, m, "the device", TOKENS).whole() for m in checkpoints}
            assert_given_up_alone(server, checkpoints, whole)
    finally:
        redis.kill()


@pytest.mark.thorough
def test_a_model_whose_loading_ends_instances_keeps_no_other_from_being_served(
    checkpoints, tmp_path
):
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent("""
            import os, sys
            if "aegaeon.instance.worker" in sys.orig_argv:
                from aegaeon.engine.engine import ModelEngine
                load = ModelEngine.load
                def die_of_it(self, action):
                    if action.model == "bob":
                        os.kill(os.getpid(), 9)  # as of memory that there is too little of
                    return load(self, action)
                ModelEngine.load = die_of_it
            if "serve" in sys.orig_argv:
                from aegaeon import child
                child.BACKOFF_S = (0.0,)
            """)
    )
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    with Server(tmp_path, checkpoints, *FLAGS, environment=environment) as server:
        whole = {m: Streamed(server.url, m, "the device", TOKENS).whole() for m in ("ada", "cleo")}
        streams = [Streamed(server.url, model, "the device", TOKENS) for model in whole]
        answer = server.ask("bob", timeout_s=90)
        assert answer.status_code == 503
        assert "while they loaded or computed 'bob'" in answer.json()["error"]["message"]
        assert [stream.whole() for stream in streams] == list(whole.values())
