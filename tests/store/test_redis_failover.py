"""A failover: another server, which may lack the last things that were acknowledged, takes over."""

import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

import aegaeon.store.redis_kept
import aegaeon.store.redis_link
from aegaeon.errors import StaleIncarnation, StoreUnavailable
from aegaeon.store.redis import RedisDomain
from aegaeon.types import InstanceRecord, InstanceStatus
from tests.support.numbered import WRITERS, NumberedRecords
from tests.support.polling import eventually
from tests.support.redis_sentinel import Failover
from tests.support.redis_server import require_redis

RECORD = InstanceRecord(
    id="i", incarnation=3, role="colocated", device="cpu", mailbox="i.3", pid=1, models=("m",)
)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Failover]:
    require_redis()
    servers = Failover(tmp_path)
    yield servers
    servers.close()


@pytest.fixture
def domain(servers: Failover) -> Iterator[RedisDomain]:
    domain = RedisDomain("d", servers.url, patience_s=20)
    yield domain
    domain.close()


def test_what_the_replica_has_heard_is_there_after_a_failover(
    servers: Failover, domain: RedisDomain
) -> None:
    store, reader = domain.metadata(), domain.create_mailbox("box")
    sender = domain.open_mailbox("box")
    store.register_instance(RECORD, 60)
    for n in range(5):
        sender.send(b"%d" % n)
    assert reader.receive(5, max_records=2) == [b"0", b"1"]
    servers.wait_heard()
    servers.fail_over()
    store.update_instance_status("i", 3, InstanceStatus(state="ready"))
    assert store.sync_for_routing()[0].status.state == "ready"
    sender.send(b"5")
    got: list[bytes] = []
    eventually(lambda: got.extend(reader.receive(0.1)) or len(got) >= 4)
    assert got == [b"2", b"3", b"4", b"5"]


def test_what_the_replica_had_not_heard_is_sent_again_and_arrives_once(
    servers: Failover, domain: RedisDomain
) -> None:
    other = RedisDomain("d", servers.url, patience_s=20)
    reader, sender = domain.create_mailbox("box"), other.open_mailbox("box")
    sender.send(b"heard")
    servers.wait_heard()
    servers.cut()
    for n in range(4):
        sender.send(b"%d" % n)
    assert reader.receive(5, max_records=3) == [b"heard", b"0", b"1"]
    servers.fail_over()
    # Nothing is sent any more: what it does anyway has the sender's process notice.
    assert other.metadata().sync_for_routing() == ()
    got: list[bytes] = []
    eventually(lambda: got.extend(reader.receive(0.1)) or len(got) >= 2)
    got.extend(reader.receive(0.3))
    assert got == [b"2", b"3"]
    reader.receive(0)
    assert domain._link.client.hget(reader._key, "held") == b"0"
    other.close()


def test_streams_of_records_pass_a_failover_without_loss_or_repetition(
    servers: Failover, domain: RedisDomain
) -> None:
    records = NumberedRecords(domain)
    records.read_for(0.2)
    servers.cut()
    records.read_for(0.2)
    killer = threading.Thread(target=servers.fail_over)
    killer.start()
    while killer.is_alive():
        records.read_for(0.1)
    records.read_for(0.5)
    records.end()
    for writer in range(WRITERS):
        assert records.got_of(writer) == list(range(records.sent[writer]))


def test_what_is_lost_for_good_is_logged(
    servers: Failover,
    domain: RedisDomain,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(aegaeon.store.redis_kept, "KEPT_BYTES", 2)
    reader, sender = domain.create_mailbox("box"), domain.open_mailbox("box")
    servers.wait_heard()
    servers.cut()
    for n in range(4):
        sender.send(b"%d" % n)
    servers.fail_over()
    sender.send(b"4")
    got: list[bytes] = []
    eventually(lambda: got.extend(reader.receive(0.1)) or len(got) >= 3)
    assert got == [b"2", b"3", b"4"]
    assert "records lost by redis" in caplog.text and "behind=0 up_to=2" in caplog.text


def test_the_newer_incarnation_keeps_its_place_where_its_entry_was_lost(
    servers: Failover, domain: RedisDomain
) -> None:
    store, newer = domain.metadata(), msgspec.structs.replace(RECORD, incarnation=4)
    old = RedisDomain("d", servers.url, patience_s=20)
    old.metadata().register_instance(RECORD, 60)
    servers.wait_heard()
    servers.cut()
    store.register_instance(newer, 60)
    servers.fail_over()
    store.update_instance_status("i", 4, InstanceStatus(state="ready"))
    assert [row.record.incarnation for row in store.sync_for_routing()] == [4]
    with pytest.raises(StaleIncarnation):
        old.metadata().update_instance_status("i", 3, InstanceStatus())
    old.close()


def test_an_old_master_that_comes_back_is_not_listened_to(
    servers: Failover, domain: RedisDomain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aegaeon.store.redis_link, "SOCKET_TIMEOUT_S", 1.5)
    fresh = RedisDomain("d", servers.url, patience_s=20)
    reader, sender = fresh.create_mailbox("box"), fresh.open_mailbox("box")
    sender.send(b"0")
    servers.wait_heard()
    servers.master.pause()
    sender.send(b"1")
    servers.wait_promoted()
    sender.send(b"2")
    servers.master.go_on()
    sender.send(b"3")
    got: list[bytes] = []
    eventually(lambda: got.extend(reader.receive(0.1)) or len(got) >= 4)
    got.extend(reader.receive(0.3))
    assert got == [b"0", b"1", b"2", b"3"]
    assert fresh._link.client.connection_pool.get_master_address()[1] == servers.replica.port
    fresh.close()


def test_sentinels_that_know_no_master_are_said(servers: Failover) -> None:
    url = servers.url.replace("main", "other")
    with pytest.raises(StoreUnavailable, match="No master found for 'other'"):
        RedisDomain("d", url, patience_s=0.3)
