"""What holds nodes together is slow and lossy, ends and is started again, or is taken over by
another one, under many streams: none is lost, and each has the tokens that it has in peace."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster_node import Cluster, make_model
from tests.support.crowds import assert_whole, begun, in_peace, lives
from tests.support.netns import NoNetwork, network
from tests.support.polling import eventually
from tests.support.redis_sentinel import Failover
from tests.support.redis_server import RedisServer, require_redis

pytestmark = pytest.mark.thorough

LEASE_S = 3.0
STREAMS = 30
SLOW = {"delay_s": 0.02, "loss": 0.01}
SLOW_TOKENS = 60


def make_cluster(directory: Path, url: str, places=(None, None, None), **settings) -> Cluster:
    given = {"models": make_model(directory), "lease_s": LEASE_S, **settings}
    return Cluster(directory, url, places, **given)


@pytest.fixture
def redis(tmp_path) -> Iterator[RedisServer]:
    require_redis()
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.mark.parametrize("away_s", [0.5, 2 * LEASE_S])
def test_a_store_that_is_killed_and_started_again_loses_no_stream(redis, tmp_path, away_s):
    """For shorter and for longer than the leases, without an instance that ends because of it."""
    with make_cluster(tmp_path, redis.url) as cluster:
        alone = in_peace(cluster.url)
        before = cluster.instances()
        streams = begun(cluster.url, STREAMS)
        redis.kill()
        if away_s > LEASE_S:
            busy = cluster.node_of(streams[0].instances[-1])
            eventually(lambda: b"lease over" in busy.log.read_bytes(), within_s=30)
        redis.start()
        assert_whole(streams, alone)
        assert all(len(lives(stream)) == 1 for stream in streams)
        eventually(lambda: cluster.instances() == before)


def test_a_store_that_is_taken_over_by_its_replica_loses_no_stream(tmp_path):
    require_redis()
    servers = Failover(tmp_path)
    try:
        with make_cluster(tmp_path, servers.url) as cluster:
            alone = in_peace(cluster.url)
            streams = begun(cluster.url, STREAMS)
            servers.cut()  # what is acknowledged from here on is lost
            eventually(lambda: any(stream.finish_reason for stream in streams), within_s=60)
            servers.fail_over()
            assert_whole(streams, alone)
            eventually(lambda: len(cluster.instances()) == 2, within_s=30)
            assert_whole(begun(cluster.url), alone)
    finally:
        servers.close()


def test_slow_and_lossy_wires_change_no_token_also_where_one_is_cut(tmp_path):
    require_redis()
    try:
        with network() as wires:
            flags = ("--protected-mode", "no")
            redis = RedisServer(tmp_path, flags=flags, host=wires.store_host)
            redis.start(persistent=False)
            places = [wires.place(), wires.place(**SLOW), wires.place(**SLOW)]
            try:
                with make_cluster(tmp_path, redis.url, places, lease_s=2 * LEASE_S) as cluster:
                    slow_and_cut(cluster)
            finally:
                redis.kill()
    except NoNetwork as why:
        pytest.skip(str(why))


def slow_and_cut(cluster: Cluster) -> None:
    """Cut the busy node off under streams, for longer than its lease."""
    alone = in_peace(cluster.url, SLOW_TOKENS)
    streams = begun(cluster.url, tokens=SLOW_TOKENS)
    node = cluster.node_of(streams[0].instances[-1])
    node.place.to_store.cut()
    try:
        assert_whole(streams, alone)
        assert any(len(lives(stream)) == 2 for stream in streams)
        assert all(len(lives(stream)) <= 2 for stream in streams)
    finally:
        node.place.to_store.mend()
    cluster.wait_ready()
