"""A server on a Ray cluster of three nodes on this machine, with a real Redis: what befalls it."""

import itertools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import make_checkpoint
from tests.support.polling import eventually
from tests.support.ray_cluster import (
    ClusteredServer,
    actor_pid,
    add_node,
    parent_of,
    ray_cluster,
    require_ray,
)
from tests.support.server import Streamed, is_running, run_cli

TOKENS = 800
LONG_TOKENS = 3000
LEASE_S = 10.0
PROMPT = "the device"


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
    flags = ("--lease-s", str(LEASE_S), "--drain-s", "0.5", "--log-level", "info")
    flags += ("--colocated-count", "1")
    flags += ("--model-cache-budget-gb", "0.1", "--kv-budget-gb", "0.1")
    with ClusteredServer(root, models, cluster.address, redis_server.url, *flags) as server:
        eventually(lambda: len(server.ready()) == 2, within_s=30)
        yield server
    assert server.left_in_shared_memory() == []
    assert server.keys() == []


@pytest.fixture(scope="module")
def undisturbed(server) -> str:
    return Streamed(server.url, "ada", PROMPT, TOKENS).whole()


@pytest.fixture
def whole(server, undisturbed) -> Iterator[str]:
    """What undisturbed tokens are; at the test's end all is as it was at its beginning."""
    yield undisturbed
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
    name = f"aegaeon-{server.domain}"
    controller = actor_pid(name)
    os.kill(controller, signal.SIGKILL)
    assert Streamed(server.url, "ada", PROMPT, TOKENS).whole() == whole
    eventually(lambda: actor_pid(name) not in (0, controller), within_s=30)
    eventually(lambda: len(server.status()["members"]) == 3, within_s=10)
    assert server.instance_pids() == pids


def test_a_killed_proxy_comes_back_where_it_was(server, whole):
    before = proxy_pid(server)
    os.kill(parent_of(before), signal.SIGKILL)
    eventually(lambda: not is_running(before))
    eventually(lambda: proxy_pid(server) not in (0, before), within_s=30)
    eventually(server.is_listening, within_s=20)
    assert Streamed(server.url, "ada", PROMPT, TOKENS).whole() == whole


def test_the_command_may_be_killed_and_run_again(server, whole):
    pids = server.instance_pids()
    server.kill()
    server.start()
    assert server.instance_pids() == pids
    assert Streamed(server.url, "ada", PROMPT, TOKENS).whole() == whole


def test_other_settings_under_the_same_name_are_refused(server, cluster, redis_server):
    told = run_cli(
        *("serve", "--cluster", cluster.address, "--domain", server.domain, "--device", "null"),
        *("--metadata-backend", "redis", "--redis-url", redis_server.url),
        *("--models", str(server.models["ada"])),
    )
    assert told.returncode == 2
    assert "serves with other settings already; stop it first" in told.stderr


def test_a_server_that_fits_no_node_says_why_and_leaves_nothing(server, cluster, redis_server):
    told = run_cli(
        *("serve", "--cluster", cluster.address, "--domain", f"{server.domain}-small"),
        *("--metadata-backend", "redis", "--redis-url", redis_server.url, "--port", "0"),
        *("--models", str(server.models["ada"]), "--kv-budget-gb", "0.000001"),
        *("--threads-per-instance", "1", "--colocated-count", "1"),
    )
    assert told.returncode == 2
    assert "raise --kv-budget-gb" in told.stderr
    assert not [name for name in server.left_in_shared_memory() if "-small-" in name]
    held = server.keys()
    assert not [key for key in held if b"-small" in key]


def test_a_node_that_is_lost_under_30_loses_no_stream_and_one_that_joins_gets_an_instance(
    server, cluster, whole
):
    streams = begun(server, 30)
    (node, name) = node_of(server, cluster, streams[0].instances[-1])
    cluster.remove_node(node, allow_graceful=False)
    assert [stream.whole() for stream in streams] == [whole] * 30
    assert_moved(streams)
    # Before any lease has ended, and before Ray, which waits for some heartbeats, says so.
    assert max(map(longest_gap_s, streams)) < LEASE_S
    eventually(lambda: name not in server.ready())
    # All its processes were killed, and none of ours is there any more.
    eventually(lambda: not memory_of(server, node.node_id), within_s=15)
    assert Streamed(server.url, "ada", PROMPT, TOKENS).whole() == whole
    new = add_node(cluster, labels={"pool": "c"})
    eventually(lambda: f"instance-{new.node_id[:8]}-0" in server.ready(), within_s=40)


def test_a_node_that_is_drained_ends_its_streams_elsewhere_and_is_empty(server, cluster, whole):
    streams = begun(server, 4, LONG_TOKENS)
    (node, name) = node_of(server, cluster, streams[0].instances[-1])
    drain(cluster, node.node_id)
    # Longer than it is let: they end elsewhere.
    (text,) = {stream.whole() for stream in streams}
    assert text.startswith(whole.rstrip("\ufffd"))
    assert_moved(streams)
    eventually(lambda: name not in server.records(), within_s=30)
    eventually(lambda: not memory_of(server, node.node_id))
    add_node(cluster, labels={"pool": "d"})
    cluster.remove_node(node)


def memory_of(server: ClusteredServer, node: str) -> list[str]:
    """Return the names in the shared memory of a node."""
    start = f"aegaeon-{server.domain}-{node[:12]}"
    return [name for name in server.left_in_shared_memory() if name.startswith(start)]


def assert_moved(streams: list[Streamed]) -> None:
    """What has befallen their instance has befallen them."""
    assert any(len(set(stream.instances)) > 1 for stream in streams)


def longest_gap_s(stream: Streamed) -> float:
    return max(after - before for before, after in itertools.pairwise(stream.times_s))


def node_of(server: ClusteredServer, cluster: Any, name: str) -> tuple[Any, str]:
    """Return the node where the instance `name` is."""
    id = server.records()[name].node
    return next(node for node in cluster.list_all_nodes() if node.node_id == id), name


def proxy_pid(server: ClusteredServer) -> int:
    """Return the pid of the proxy; 0 while there is none."""
    actor = actor_pid(f"aegaeon-{server.domain}-proxy-0")
    for file in Path(f"/proc/{actor}/task").glob("*/children"):
        for pid in file.read_text().split():
            if b"aegaeon.proxy.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
    return 0


def drain(cluster: Any, node: str) -> None:
    """As `ray drain-node` does."""
    import ray  # noqa: PLC0415  an extra
    from ray.core.generated import autoscaler_pb2  # noqa: PLC0415

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    client = ray._raylet.GcsClient(address=cluster.address)
    deadline_ms = int(1000 * (time.time() + 600))
    is_accepted, why = client.drain_node(node, reason, "a test", deadline_ms)
    assert is_accepted, why
