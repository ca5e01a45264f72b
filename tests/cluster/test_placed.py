"""Models that live on some nodes of a Ray cluster each: spread, moved by load, placed again when
their node is lost, and no stream that notices."""

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from aegaeon.store.redis import RedisDomain
from tests.support.checkpoints import make_checkpoint
from tests.support.polling import eventually
from tests.support.ray_cluster import (
    ClusteredServer,
    actor_pid,
    add_node,
    ray_cluster,
    require_ray,
)
from tests.support.server import Streamed, run_cli

NAMES = ("ada", "bob", "cyd", "dan", "eve", "fay")
TOKENS = 400
PROMPT = "the device"
EPOCH_S = 2.0
# A promise that small models keep with a good part of a device's time: what is busy is crowded.
FILE = f"""
slo_tbt_s = 0.004
[cluster]
replicas = 1
rebalance_s = {EPOCH_S}
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that runs nothing but proxies, and three nodes."""
    require_ray()
    with ray_cluster({}, {}, {}) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def server(cluster, redis_server, tmp_path_factory) -> Iterator[ClusteredServer]:
    root = tmp_path_factory.mktemp("placed")
    file = root / "server.toml"
    file.write_text(FILE)
    models = {
        name: make_checkpoint(root / name, "llama", seed=seed, max_position_embeddings=4096)
        for seed, name in enumerate(NAMES)
    }
    flags = ("--config", str(file), "--lease-s", "10", "--drain-s", "0.5", "--log-level", "info")
    flags += ("--model-cache-budget-gb", "0.1", "--kv-budget-gb", "0.1")
    with ClusteredServer(root, models, cluster.address, redis_server.url, *flags) as server:
        eventually(lambda: len(server.ready()) == 3, within_s=60)
        yield server
    assert server.left_in_shared_memory() == []
    assert server.keys() == []


@pytest.fixture(scope="module")
def undisturbed(server) -> dict[str, str]:
    """What each model says, one after the other."""
    return {name: Streamed(server.url, name, PROMPT, TOKENS).whole() for name in NAMES}


def homes(server: ClusteredServer) -> dict[str, set[str]]:
    """Return the nodes whose instances serve each model."""
    found: dict[str, set[str]] = {name: set() for name in NAMES}
    for record in server.records().values():
        for model in record.models:
            found[model].add(record.node)
    return found


def is_settled(server: ClusteredServer) -> bool:
    """Whether models are served where they live, and nowhere else."""
    told = {model["id"]: model for model in server.status()["models"]}
    return all(
        set(told[name]["nodes"]) == nodes and nodes and not told[name]["leaving"]
        for name, nodes in homes(server).items()
    )


def is_kept(server: ClusteredServer, url: str) -> bool:
    """Whether the store has a placement, of a version that all instances have followed."""
    domain = RedisDomain(server.domain, url)
    try:
        catalog = domain.catalog().read()
    finally:
        domain.close()
    versions = {status.catalog for status in server.statuses().values()}
    return catalog.placement is not None and versions == {catalog.version}


def test_models_are_spread_over_the_nodes_and_each_answers(server, undisturbed):
    assert len(set(undisturbed.values())) == len(NAMES)
    eventually(lambda: is_settled(server), within_s=30)
    status = server.status()
    assert status["placement"] == "load"
    assert len({node for nodes in homes(server).values() for node in nodes}) == 3
    shown = run_cli("status", "--url", server.url).stdout
    assert "lives on" in shown and "models have nodes by their load" in shown


def test_load_that_shifts_moves_models_and_no_stream_notices(server, undisturbed):
    """One is asked for, then another: each has more nodes then than before, and again fewer."""
    for hot in ("ada", "bob"):
        moved, give_up_s = False, time.monotonic() + 60
        while not moved:
            assert time.monotonic() < give_up_s, homes(server)
            streams = [Streamed(server.url, hot, PROMPT, TOKENS) for _ in range(6)]
            streams += [Streamed(server.url, name, PROMPT, TOKENS) for name in ("cyd", "dan")]
            assert [stream.whole() for stream in streams[:6]] == [undisturbed[hot]] * 6
            assert [stream.whole() for stream in streams[6:]] == [
                undisturbed["cyd"],
                undisturbed["dan"],
            ]
            moved = len(homes(server)[hot]) > 1
    eventually(lambda: len(homes(server)["ada"]) == 1, within_s=90)


def test_a_killed_controller_and_a_store_that_forgot_leave_every_model_served(
    server, redis_server, undisturbed
):
    # What was busy is so no more: nothing moves by itself.
    eventually(lambda: all(len(nodes) == 1 for nodes in homes(server).values()), within_s=90)
    eventually(lambda: is_settled(server), within_s=60)
    before = homes(server)
    os.kill(actor_pid(f"aegaeon-{server.domain}"), signal.SIGKILL)
    redis_server.kill()
    redis_server.start(persistent=False)
    eventually(lambda: len(server.ready()) == 3, within_s=60)
    eventually(lambda: is_kept(server, redis_server.url), within_s=60)
    eventually(lambda: is_settled(server), within_s=60)
    # What was measured before is forgotten, too: one may have a better place by now.
    assert {name: len(nodes) for name, nodes in homes(server).items()} == dict.fromkeys(before, 1)
    assert Streamed(server.url, "ada", PROMPT, TOKENS).whole() == undisturbed["ada"]


def test_a_lost_nodes_models_are_placed_again_and_asked_for_all_the_while(
    server, cluster, undisturbed
):
    eventually(lambda: is_settled(server), within_s=60)
    before = homes(server)
    counts = Counter(node for nodes in before.values() for node in nodes)
    name = next(iter(before["ada"]))
    node = next(one for one in cluster.list_all_nodes() if one.node_id == name)
    assert counts[name]
    streams = [Streamed(server.url, model, PROMPT, TOKENS) for model in NAMES]
    eventually(lambda: all(stream.has_begun for stream in streams), within_s=60)
    cluster.remove_node(node, allow_graceful=False)
    # Some of these models live nowhere just now: who asks for them waits.
    streams += [Streamed(server.url, model, PROMPT, TOKENS) for model in NAMES]
    assert [stream.whole() for stream in streams] == [undisturbed[name] for name in NAMES] * 2
    eventually(lambda: all(nodes and name not in nodes for nodes in homes(server).values()), 30)
    told = {model["id"]: model for model in server.status()["models"]}
    for model, nodes in before.items():
        if nodes == {name}:
            assert told[model]["placed"] == "lost"


def test_a_node_that_joins_serves_what_gets_busy(server, cluster, undisturbed):
    new = add_node(cluster).node_id
    eventually(lambda: len(server.ready()) == 3, within_s=60)
    give_up_s = time.monotonic() + 60
    while not any(new in nodes for nodes in homes(server).values()):
        assert time.monotonic() < give_up_s, homes(server)
        streams = [Streamed(server.url, name, PROMPT, TOKENS) for name in (*NAMES, *NAMES)]
        texts = [stream.whole() for stream in streams]
        assert texts == [undisturbed[name] for name in NAMES] * 2
    model = next(name for name, nodes in homes(server).items() if new in nodes)
    streams = [Streamed(server.url, model, PROMPT, TOKENS) for _ in range(8)]
    assert {stream.whole() for stream in streams} == {undisturbed[model]}
