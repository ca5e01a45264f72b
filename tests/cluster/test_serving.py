"""A server on a Ray cluster of three nodes on this machine, with a real Redis: what befalls it."""

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.checkpoints import make_checkpoint
from tests.support.polling import eventually
from tests.support.ray_cluster import (
    ClusteredServer,
    add_node,
    parent_of,
    ray_cluster,
    require_ray,
)
from tests.support.redis_server import RedisServer, require_redis
from tests.support.server import Streamed, is_running, run_cli

TOKENS = 800
LEASE_S = 20.0  # beyond what any test waits for: nothing here is to rely on its end
PROMPT = "the device"


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory) -> Iterator[RedisServer]:
    require_redis()
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start(persistent=False)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that runs nothing but proxies, and two nodes."""
    require_ray()
    with ray_cluster({"labels": {"pool": "a"}}, {"labels": {"pool": "b"}}) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def server(cluster, redis_server, tmp_path_factory) -> Iterator[ClusteredServer]:
    root = tmp_path_factory.mktemp("served")
    models = {"ada": make_checkpoint(root / "ada", "llama", seed=1, max_position_embeddings=4096)}
    flags = ("--lease-s", str(LEASE_S), "--drain-s", "2", "--log-level", "info")
    flags += ("--model-cache-budget-gb", "0.1", "--kv-budget-gb", "0.1")
    with ClusteredServer(root, models, cluster.address, redis_server.url, *flags) as server:
        eventually(lambda: len(server.ready()) == 2, within_s=30)
        yield server
    assert server.left_in_shared_memory() == []
    assert server.keys() == []


@pytest.fixture
def whole(server) -> Iterator[str]:
    """What undisturbed tokens are; at the test's end all is as it was at its beginning."""
    yield Streamed(server.url, "ada", PROMPT, TOKENS).whole()
    eventually(lambda: len(server.ready()) == 2, within_s=40)


def begun(server: ClusteredServer, count: int, tokens: int = TOKENS) -> list[Streamed]:
    """Streams that have begun."""
    streams = [Streamed(server.url, "ada", PROMPT, tokens) for _ in range(count)]
    eventually(lambda: all(stream.has_begun for stream in streams), within_s=30)
    return streams


def test_each_node_has_its_instance_and_status_shows_them(server, whole):
    status = server.status()
    names = {member["name"]: member for member in status["members"]}
    nodes = {node["id"] for node in status["nodes"]}
    assert len(nodes) == 3
    instances = {row["id"]: row for row in status["instances"]}
    assert sorted(instances) == sorted(n for n, m in names.items() if m["kind"] == "instance")
    assert len({row["node"] for row in instances.values()} & nodes) == 2
    assert all(0 < row["lease_left_s"] <= LEASE_S for row in instances.values())
    assert names["proxy-0"]["url"] == server.url
    (model,) = status["models"]
    assert model["replicas"] == sum("ada" in row["resident"] for row in instances.values()) > 0

    shown = run_cli("status", "--url", server.url).stdout
    assert all(name in shown for name in names), shown
    assert "pool=a" in shown and "pool=b" in shown, shown
    assert len(server.left_in_shared_memory()) >= 2 * 3  # lock, layout, weights, ... of each node


def test_a_killed_instance_is_started_again_and_its_streams_go_on(server, whole):
    streams = begun(server, 4)
    name = streams[0].instances[-1]
    before = server.records()[name]
    os.kill(before.pid, signal.SIGKILL)
    assert [stream.whole() for stream in streams] == [whole] * 4
    assert_moved(streams)
    eventually(lambda: server.instance_pids().get(name) not in (None, before.pid), within_s=20)
    assert server.records()[name].incarnation > before.incarnation


def test_a_killed_actor_takes_its_instance_along_and_ray_starts_it_again(server, whole):
    streams = begun(server, 4)
    name = streams[0].instances[-1]
    before = server.records()[name]
    os.kill(parent_of(before.pid), signal.SIGKILL)
    eventually(lambda: not is_running(before.pid))
    assert [stream.whole() for stream in streams] == [whole] * 4
    assert_moved(streams)
    eventually(lambda: server.instance_pids().get(name) not in (None, before.pid), within_s=30)
    (member,) = [m for m in server.status()["members"] if m["name"] == name]
    assert member["restarts"] >= 1


def test_a_killed_controller_finds_its_members(server, whole):
    pids = server.instance_pids()
    controller = controller_pid(server)
    os.kill(controller, signal.SIGKILL)
    assert Streamed(server.url, "ada", PROMPT, TOKENS).whole() == whole
    eventually(lambda: controller_pid(server) not in (0, controller), within_s=30)
    eventually(lambda: len(server.status()["members"]) == 3, within_s=10)
    assert server.instance_pids() == pids


def test_a_node_that_is_lost_loses_no_stream_and_one_that_joins_gets_an_instance(
    server, cluster, whole
):
    streams = begun(server, 6)
    (node, name) = node_of(server, cluster, streams[0].instances[-1])
    cluster.remove_node(node, allow_graceful=False)
    assert [stream.whole() for stream in streams] == [whole] * 6
    assert_moved(streams)
    eventually(lambda: name not in server.ready())
    assert Streamed(server.url, "ada", PROMPT, TOKENS).whole() == whole
    new = add_node(cluster, labels={"pool": "c"})
    eventually(lambda: f"instance-{new.node_id[:8]}-0" in server.ready(), within_s=40)


def test_a_node_that_is_drained_ends_its_streams_elsewhere_and_is_empty(server, cluster, whole):
    streams = begun(server, 4)
    (node, name) = node_of(server, cluster, streams[0].instances[-1])
    drain(cluster, node.node_id)
    assert [stream.whole() for stream in streams] == [whole] * 4
    assert_moved(streams)
    eventually(lambda: name not in server.records(), within_s=30)
    memory = f"aegaeon-{server.domain}-{node.node_id[:12]}"
    eventually(lambda: not any(n.startswith(memory) for n in server.left_in_shared_memory()))
    add_node(cluster, labels={"pool": "d"})
    cluster.remove_node(node)


def assert_moved(streams: list[Streamed]) -> None:
    """What has befallen their instance has befallen them."""
    assert any(len(set(stream.instances)) > 1 for stream in streams)


def controller_pid(server: ClusteredServer) -> int:
    import ray  # noqa: PLC0415  an extra

    for actor in ray._private.state.actors().values():
        if actor["Name"] == f"aegaeon-{server.domain}" and actor["State"] == "ALIVE":
            return int(actor["Pid"])
    return 0


def node_of(server: ClusteredServer, cluster: Any, name: str) -> tuple[Any, str]:
    """Return the node where the instance `name` is."""
    id = server.records()[name].node
    return next(node for node in cluster.list_all_nodes() if node.node_id == id), name


def drain(cluster: Any, node: str) -> None:
    """As `ray drain-node` does."""
    import ray  # noqa: PLC0415  an extra
    from ray.core.generated import autoscaler_pb2  # noqa: PLC0415

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    client = ray._raylet.GcsClient(address=cluster.address)
    deadline_ms = int(1000 * (time.time() + 600))
    is_accepted, why = client.drain_node(node, reason, "a test", deadline_ms)
    assert is_accepted, why
