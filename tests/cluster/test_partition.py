"""Nodes with addresses of their own, without Ray: nodes and proxies that are cut off from the store
without a word. No stream is lost, and each has the tokens that it has in peace."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.support.cluster_node import Cluster, make_model
from tests.support.crowds import assert_whole, begun, in_peace, lives
from tests.support.netns import NoNetwork, network
from tests.support.polling import eventually
from tests.support.redis_server import RedisServer, require_redis

LEASE_S = 3.0


# The null device computes no model, and its tokens follow from the request and their places alone.
@pytest.fixture(scope="module", params=["null", pytest.param("cpu", marks=pytest.mark.thorough)])
def cluster(request, tmp_path_factory) -> Iterator[Cluster]:
    """A front and two nodes; where that may be, each at a place with an address of its own."""
    require_redis()
    directory = tmp_path_factory.mktemp("cluster")
    with ExitStack() as stack:
        try:
            wires = stack.enter_context(network())
        except NoNetwork:
            redis, places = RedisServer(directory), [None] * 3
        else:
            flags = ("--protected-mode", "no")
            redis = RedisServer(directory, flags=flags, host=wires.store_host)
            places = [wires.place() for _ in range(3)]
        redis.start(persistent=False)
        stack.callback(redis.kill)
        settings = {"models": make_model(directory), "device": request.param, "lease_s": LEASE_S}
        yield stack.enter_context(Cluster(directory, redis.url, places, **settings))


@pytest.fixture
def cables(cluster) -> None:
    """Skips the test, with the reason, where nothing can be cut."""
    if cluster.front.place is None:
        with pytest.raises(NoNetwork) as why, network():
            pass
        pytest.skip(str(why.value))


@pytest.fixture(scope="module")
def alone(cluster) -> dict[str, str]:
    return in_peace(cluster.url)


def test_a_node_that_is_cut_off_stops_within_its_lease_and_its_streams_go_on_once(
    cluster, cables, alone
):
    cut_off_the_busy_one(cluster, alone)


@pytest.mark.thorough
def test_one_that_has_come_back_serves_those_of_the_next_that_is_cut_off(cluster, cables, alone):
    first = cut_off_the_busy_one(cluster, alone)
    second = cut_off_the_busy_one(cluster, alone)
    assert first != second


def cut_off_the_busy_one(cluster: Cluster, alone: dict[str, str]) -> str:
    """Cut the node off that has the streams until they have ended elsewhere; return its name."""
    streams = begun(cluster.url)
    node = cluster.node_of(streams[0].instances[-1])
    before = cluster.instances()[node.name]
    there = [stream for stream in streams if lives(stream)[-1] == before.id]
    logged = len(node.log.read_bytes())
    node.place.to_store.cut()
    try:
        eventually(lambda: b"lease over" in node.log.read_bytes()[logged:], within_s=30)
        assert_whole(streams, alone)
        # Once, to the other one; the others have not moved.
        assert any(len(lives(stream)) == 2 for stream in there)
        assert all(len(lives(stream)) <= 2 for stream in there)
        assert all(len(lives(stream)) == 1 for stream in streams if stream not in there)
        assert node.name not in cluster.instances()
    finally:
        node.place.to_store.mend()
    # It finds that its requests are elsewhere, and comes back as a new one that has none.
    eventually(lambda: node.name in cluster.instances(), within_s=60)
    assert cluster.instances()[node.name].incarnation > before.incarnation
    assert b"replaced error=" in node.log.read_bytes()[logged:]
    return node.name


@pytest.mark.thorough
def test_a_node_without_requests_that_is_cut_off_goes_on_as_it_was(cluster, cables):
    node = cluster.nodes[0]
    before = cluster.instances()[node.name]
    logged = len(node.log.read_bytes())
    node.place.to_store.cut()
    try:
        eventually(lambda: b"lease over" in node.log.read_bytes()[logged:], within_s=30)
        eventually(lambda: node.name not in cluster.instances(), within_s=30)
    finally:
        node.place.to_store.mend()
    eventually(lambda: node.name in cluster.instances(), within_s=60)
    assert cluster.instances()[node.name] == before
    assert b"lease goes on waiting={} running={}" in node.log.read_bytes()[logged:]


@pytest.mark.thorough
def test_a_proxy_that_is_cut_off_keeps_its_streams(cluster, cables, alone):
    streams = begun(cluster.url)
    before = cluster.instances()
    cluster.front.place.to_store.cut()
    try:
        # Longer than any lease; its instances serve on, and what they say waits in the store.
        eventually(cluster.is_unready, within_s=60)
        assert any(stream.finish_reason is None for stream in streams)
    finally:
        cluster.front.place.to_store.mend()
    assert_whole(streams, alone)
    assert all(len(lives(stream)) == 1 for stream in streams)
    assert cluster.instances() == before
    eventually(lambda: not cluster.is_unready(), within_s=30)


@pytest.mark.thorough
def test_a_node_that_is_killed_under_30_streams_loses_none(cluster, alone):
    streams = begun(cluster.url, 30)
    node = cluster.node_of(streams[0].instances[-1])
    there = [stream for stream in streams if lives(stream)[-1] == f"instance-{node.name}-0"]
    node.kill()
    assert_whole(streams, alone)
    assert any(len(lives(stream)) == 2 for stream in there)
    assert all(len(lives(stream)) <= 2 for stream in there)
    assert all(len(lives(stream)) == 1 for stream in streams if stream not in there)
    assert node.name not in cluster.instances()
    node.start()
    cluster.wait_ready()
