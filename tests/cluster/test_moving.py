"""Requests that go from node to node with their KV, over a real Redis and TCP: tokens are the same,
streams go on."""

import os
import uuid

import msgspec
import pytest

from aegaeon.config import Settings
from aegaeon.models.references import resolve
from tests.support.checkpoints import make_checkpoint
from tests.support.polling import eventually
from tests.support.redis_server import RedisServer, require_redis
from tests.support.server import Server, Streamed
from tests.support.two_nodes import NODES, TwoNodes

pytestmark = pytest.mark.thorough  # four processes each

TOKENS = 1500
PROMPT = "the device " * 20


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Settings and specs of a small model, and a Redis."""
    require_redis()
    root = tmp_path_factory.mktemp("nodes")
    server = RedisServer(root)
    server.start(persistent=False)
    path = make_checkpoint(root / "ada", "llama", seed=1, max_position_embeddings=4096)
    settings = Settings(
        device="cpu",
        metadata_backend="redis",
        redis_url=server.url,
        cluster="auto",
        models=(f"ada={path}",),
        domain=f"test-moving-{os.getpid()}",
        threads_per_instance=1,
        colocated_count=1,
        kv_budget_gb=0.1,
        model_cache_budget_gb=0.1,
        drain_s=60.0,
        port=0,
        log_level="info",
    )
    yield settings, (resolve(f"ada={path}", str(root)),)
    server.kill()


@pytest.fixture(scope="module")
def expected(made, tmp_path_factory):
    """What one instance, whose requests stay where they are, answers."""
    _, (spec,) = made
    with Server(tmp_path_factory.mktemp("alone"), {"ada": spec.path}) as server:
        return Streamed(server.url, "ada", PROMPT, TOKENS).whole()


@pytest.fixture
def nodes(made, tmp_path):
    settings, specs = made
    settings = settings_of(settings)
    with TwoNodes(tmp_path, settings, specs) as nodes:
        yield nodes
    assert nodes.left_in_shared_memory() == []


def settings_of(settings):
    return msgspec.structs.replace(settings, domain=f"{settings.domain}-{uuid.uuid4().hex[:6]}")


def begun(nodes, count):
    streams = [Streamed(nodes.url, "ada", PROMPT, TOKENS) for _ in range(count)]
    eventually(lambda: all(stream.has_begun for stream in streams), within_s=30)
    return streams


def test_a_drained_nodes_streams_go_on_at_another_one_with_their_kv(nodes, expected):
    names = {"instance-a-0", "instance-b-0"}
    for name, node in zip(sorted(names), NODES, strict=True):
        nodes.begin(name, node)
    for name in names:
        nodes.member(name).wait_ready()
    streams = begun(nodes, 3)
    place = streams[0].instances[-1]
    there = sum(stream.instances[-1] == place for stream in streams)
    nodes.member(place).drain()
    nodes.member(place).wait()
    assert nodes.requests() > 0  # it did not wait for their ends
    assert [stream.whole() for stream in streams] == [expected] * 3
    assert set(streams[0].instances) == names
    log = nodes.log.read_text()
    assert log.count("kv came") == there and "prefilling again" not in log


def test_what_is_prefilled_on_one_node_is_decoded_on_another(nodes, expected):
    split = {"colocated_count": 0, "prefill_count": 1, "decode_count": 1}
    nodes.begin("instance-a-0", NODES[0], 0, **split).wait_ready()
    nodes.begin("instance-b-1", NODES[1], 1, **split).wait_ready()
    streams = begun(nodes, 2)
    assert {stream.whole() for stream in streams} == {expected}
    assert all(stream.instances[-1] == "instance-b-1" for stream in streams)
    log = nodes.log.read_text()
    assert log.count("kv came") == 2 and "prefilling again" not in log
