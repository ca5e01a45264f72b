"""A Redis server whose memory is bounded: what has to go on there does, and the rest is said."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from aegaeon.errors import ConfigError, RingFull, StoreUnavailable
from aegaeon.store.redis import RedisDomain
from aegaeon.store.redis_scripts import ABANDONED_MS
from aegaeon.types import InstanceRecord, InstanceStatus
from tests.support.redis_server import RedisServer, require_redis

RECORD = InstanceRecord(
    id="i", incarnation=3, role="colocated", device="cpu", mailbox="i.3", pid=1, models=("m",)
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    require_redis()
    server = RedisServer(tmp_path)
    server.start(persistent=False)
    yield server
    server.kill()


def test_a_server_without_memory_refuses_records_and_goes_on_with_leases(
    server: RedisServer,
) -> None:
    domain = RedisDomain("d", server.url)
    store, reader = domain.metadata(), domain.create_mailbox("box")
    sender = domain.open_mailbox("box")
    store.register_instance(RECORD, 60)
    sender.send(b"before" + bytes(10_000))
    client = domain._link.client
    client.config_set("maxmemory", 1)
    with pytest.raises(StoreUnavailable, match="raise maxmemory"):
        sender.send(b"refused")
    store.update_instance_status("i", 3, InstanceStatus(state="ready"))
    store.register_instance(RECORD, 60)
    store.update_instance_status("i", 3, InstanceStatus(state="draining"))
    assert store.sync_for_routing()[0].status.state == "draining"
    assert len(reader.receive(5)) == 1
    assert reader.receive(0.01) == []
    assert client.xlen(reader._stream) == 0
    assert client.hget(reader._key, "held") == b"0"
    client.config_set("maxmemory", 0)
    sender.send(b"after")
    assert reader.receive(5) == [b"after"]
    domain.close()


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_server_that_removes_keys_to_make_room_is_refused(
    server: RedisServer, policy: str
) -> None:
    domain = RedisDomain("d", server.url)
    domain._link.client.config_set("maxmemory-policy", policy)
    RedisDomain("d", server.url).close()  # without a bound it removes nothing
    domain._link.client.config_set("maxmemory", "1gb")
    with pytest.raises(ConfigError, match=f"{policy}.*maxmemory-policy noeviction"):
        RedisDomain("d", server.url)
    domain.close()


def test_a_mailbox_that_nobody_reads_holds_no_more_than_its_capacity(server: RedisServer) -> None:
    domain, capacity_bytes = RedisDomain("d", server.url), 1 << 16
    reader = domain.create_mailbox("box", capacity_bytes)
    senders = [domain.open_mailbox("box") for _ in range(3)]
    for sender in senders:
        with pytest.raises(RingFull):
            for _ in range(capacity_bytes):
                sender.send(bytes(50))
        reader.wake()
    client = domain._link.client
    used_bytes = sum(client.memory_usage(key, samples=0) for key in client.keys("*"))
    assert used_bytes < 3 * capacity_bytes
    domain.close()


def test_nothing_is_left_of_those_who_closed_what_they_opened(server: RedisServer) -> None:
    domain = RedisDomain("d", server.url)
    store, reader = domain.metadata(), domain.create_mailbox("box")
    sender = domain.open_mailbox("box")
    store.register_instance(RECORD, 60)
    sender.send(b"unread")
    reader.wake()
    sender.close()
    reader.close()
    store.remove_instance("i", 3)
    # But for a number, for an hour: it may live on somewhere, cut off, and is not to come back.
    client = domain._link.client
    assert client.keys("*") == [b"aegaeon:{d}:fence:i"]
    assert 0 < client.pttl("aegaeon:{d}:fence:i") <= ABANDONED_MS
    domain.unlink()
    assert client.keys("*") == []
    domain.close()
