"""What only the Redis store must bear: a server that goes away, comes back, or has forgotten."""

import logging
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

import aegaeon.store.domains
import aegaeon.store.redis
import aegaeon.store.redis_link
from aegaeon.config import Settings
from aegaeon.errors import ConfigError, RingClosed, StaleIncarnation, StoreUnavailable
from aegaeon.store.domains import join_domain
from aegaeon.store.redis import RedisDomain
from aegaeon.store.redis_link import RedisLink
from aegaeon.store.redis_url import without_password
from aegaeon.types import InstanceRecord, InstanceStatus
from tests.support.numbered import WRITERS, NumberedRecords
from tests.support.polling import eventually
from tests.support.redis_server import RedisServer, require_redis

RECORD = InstanceRecord(
    id="i", incarnation=3, role="colocated", device="cpu", mailbox="i.3", pid=1, models=("m",)
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of the test's own, to be killed."""
    require_redis()
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def domain(server: RedisServer) -> Iterator[RedisDomain]:
    domain = RedisDomain("d", server.url, patience_s=20)
    yield domain
    domain.close()


def restart(server: RedisServer, persistent: bool = True) -> None:
    server.kill()
    server.start(persistent)


def test_table_and_mailbox_survive_a_restart_of_the_server(
    server: RedisServer, domain: RedisDomain
) -> None:
    store, reader = domain.metadata(), domain.create_mailbox("box")
    sender = domain.open_mailbox("box")
    store.register_instance(RECORD, 60)
    store.update_instance_status("i", 3, InstanceStatus(state="ready"))
    store.record_assignment("r", "i", 60)
    for n in range(10):
        sender.send(b"%d" % n)
    assert reader.receive(5, max_records=3) == [b"0", b"1", b"2"]
    restart(server)
    assert store.sync_for_routing()[0].status.state == "ready"
    assert store.get_assignment("r") == "i"
    assert reader.receive(5) == [b"%d" % n for n in range(3, 10)]
    restart(server)
    assert reader.receive(0.01) == []
    sender.send(b"after")
    assert reader.receive(5) == [b"after"]


def test_nothing_acknowledged_is_lost_or_doubled_while_the_server_is_killed(
    server: RedisServer, domain: RedisDomain
) -> None:
    records = NumberedRecords(domain)
    for _ in range(4):
        killer = threading.Timer(0.2, restart, args=(server,))
        killer.start()
        records.read_for(0.6)
        killer.join()
    records.end()
    for writer in range(WRITERS):
        assert records.sent[writer] > 10
        assert records.got_of(writer) == list(range(records.sent[writer]))


def test_a_blocked_reader_survives_a_restart(server: RedisServer, domain: RedisDomain) -> None:
    reader, sender = domain.create_mailbox("box"), domain.open_mailbox("box")

    def restart_and_send() -> None:
        restart(server)
        sender.send(b"after")

    timer = threading.Timer(0.1, restart_and_send)
    timer.start()
    assert reader.receive(30) == [b"after"]
    timer.join()


def test_a_server_that_forgot_everything_is_told_again(
    server: RedisServer, domain: RedisDomain
) -> None:
    store, reader = domain.metadata(), domain.create_mailbox("box")
    store.register_instance(RECORD, 60)
    server.kill()
    for file in (server._directory / "appendonlydir").iterdir():
        file.unlink()
    server.start(persistent=False)
    store.update_instance_status("i", 3, InstanceStatus(state="ready"))
    assert store.sync_for_routing()[0].status.state == "ready"
    eventually(lambda: reader.receive(0.05) or domain._link.client.exists(reader._key))
    domain.open_mailbox("box").send(b"again")
    assert reader.receive(5) == [b"again"]


def test_a_lease_that_ended_without_an_outage_stays_ended(
    server: RedisServer, domain: RedisDomain
) -> None:
    store = domain.metadata()
    restart(server)
    store.register_instance(RECORD, 0.02)
    eventually(lambda: store.sync_for_routing() == ())
    with pytest.raises(StaleIncarnation):
        store.update_instance_status("i", 3, InstanceStatus())


def paused(server: RedisServer, seconds: float) -> threading.Timer:
    """Pause the server for so long, from now; returns what ends that."""
    server.pause()
    timer = threading.Timer(seconds, server.go_on)
    timer.start()
    return timer


def test_a_lease_that_ended_while_the_server_was_silent_goes_on(
    server: RedisServer, domain: RedisDomain
) -> None:
    store = domain.metadata()
    store.register_instance(RECORD, 0.5)
    timer = paused(server, 1.0)
    store.update_instance_status("i", 3, InstanceStatus(state="ready"))
    assert store.sync_for_routing()[0].status.state == "ready"
    timer.join()
    newer = msgspec.structs.replace(RECORD, incarnation=4)
    domain.metadata().register_instance(newer, 60)
    with pytest.raises(StaleIncarnation):
        store.update_instance_status("i", 3, InstanceStatus())


def test_a_lease_goes_on_that_ended_while_something_else_was_asked_in_vain(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aegaeon.store.redis_link, "SOCKET_TIMEOUT_S", 0.8)
    domain = RedisDomain("d", server.url, patience_s=0.1)
    store, inbox = domain.metadata(), domain.create_mailbox("box")
    store.register_instance(RECORD, 0.5)
    timer = paused(server, 1.2)
    with pytest.raises(StoreUnavailable):
        inbox.receive(0.1)
    store.update_instance_status("i", 3, InstanceStatus(state="ready"))
    assert store.sync_for_routing()[0].status.state == "ready"
    timer.join()
    domain.close()


def test_a_row_that_somebody_removed_is_not_entered_again(domain: RedisDomain) -> None:
    store = domain.metadata()
    store.register_instance(RECORD, 60)
    domain._link.client.delete(domain._store._instance_key("i"))
    with pytest.raises(StaleIncarnation):
        store.update_instance_status("i", 3, InstanceStatus())


def test_those_who_look_wait_for_instances_whose_leases_ended_in_a_silence(
    server: RedisServer, domain: RedisDomain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aegaeon.store.redis, "OUTAGE_S", 0.2)
    monkeypatch.setattr(aegaeon.store.redis, "REENTRY_S", 0.5)
    owner, looking = domain.metadata(), RedisDomain("d", server.url).metadata()
    owner.register_instance(RECORD, 0.5)
    assert [row.record.id for row in looking.sync_for_routing()] == ["i"]
    timer = paused(server, 1.0)
    assert [row.record.id for row in looking.sync_for_routing()] == ["i"]
    timer.join()
    eventually(lambda: looking.sync_for_routing() == ())


def test_one_whose_requests_went_elsewhere_in_a_silence_is_not_entered_again(
    server: RedisServer, domain: RedisDomain
) -> None:
    store, other = domain.metadata(), RedisDomain("d", server.url)
    store.register_instance(RECORD, 0.5)
    timer = paused(server, 1.0)
    # Who finds it gone says so before anything else is done; here, before it is back itself.
    other._link.call(other._link.client.ping)
    other.metadata().remove_instance("i", 3)
    with pytest.raises(StaleIncarnation):
        store.update_instance_status("i", 3, InstanceStatus(state="ready"))
    with pytest.raises(StaleIncarnation):
        store.register_instance(RECORD, 60)
    assert store.sync_for_routing() == ()
    timer.join()
    store.register_instance(msgspec.structs.replace(RECORD, incarnation=4), 60)
    other.metadata().remove_instance("i", 3)  # told twice: no newer one's business
    store.update_instance_status("i", 4, InstanceStatus(state="ready"))
    assert [row.record.incarnation for row in store.sync_for_routing()] == [4]
    # And an older fence does not take a newer one back.
    other.metadata().remove_instance("i", 2)
    with pytest.raises(StaleIncarnation):
        store.register_instance(RECORD, 60)
    other.close()


@pytest.mark.parametrize(("lease_s", "holds", "patience_s"), [(6.0, True, 1.0), (6.0, False, 5.0)])
def test_an_answer_is_waited_for_for_a_part_of_the_lease(
    server: RedisServer, lease_s: float, holds: bool, patience_s: float
) -> None:
    domain = RedisDomain("d", server.url, lease_s=lease_s, holds_lease=holds)
    link = domain._link
    assert (link.answer_s, link.patience_s) == (pytest.approx(1.0), pytest.approx(patience_s))
    told = link.client.connection_pool.connection_kwargs
    assert told["socket_timeout"] == told["socket_connect_timeout"] == link.answer_s
    domain.close()


def test_a_reader_waits_for_less_than_an_answer_however_short_the_lease(
    server: RedisServer,
) -> None:
    domain = RedisDomain("d", server.url, lease_s=1.2, holds_lease=True)
    reader, silences = domain.create_mailbox("box"), domain._link.unheard_s
    assert reader.receive(0.9) == []
    assert domain._link.unheard_s == silences  # no answer was late
    domain.close()


def test_a_replaced_reader_learns_that_it_is_closed(domain: RedisDomain) -> None:
    old = domain.create_mailbox("box")
    domain.create_mailbox("box")
    with pytest.raises(RingClosed):
        old.receive(5)


def test_a_server_that_stays_away_is_said_with_the_remedy(tmp_path: Path) -> None:
    require_redis()
    server = RedisServer(tmp_path, password="s3cret")
    server.start()
    domain = RedisDomain("d", server.url, patience_s=0.2)
    store, reader = domain.metadata(), domain.create_mailbox("box")
    sender = domain.open_mailbox("box")
    server.kill()
    for use in (
        store.sync_for_routing,
        lambda: store.record_assignment("r", "i", 1),
        lambda: sender.send(b"x"),
        lambda: reader.receive(5),
    ):
        with pytest.raises(StoreUnavailable, match=rf"127\.0\.0\.1:{server.port}.*start it") as e:
            use()
        assert "s3cret" not in str(e.value)
    domain.close()


def test_who_joins_a_server_that_runs_waits_for_a_store_that_is_silent_just_now(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aegaeon.store.domains, "JOIN_PAUSE_S", 0.01)
    defaults = (0.05, math.inf, False)
    monkeypatch.setattr(RedisDomain.__init__, "__defaults__", defaults)
    settings = Settings(domain="d", metadata_backend="redis", redis_url=server.url)
    server.kill()
    with pytest.raises(StoreUnavailable):
        join_domain(settings, patience_s=0.1)
    timer = threading.Timer(0.5, server.start)
    timer.start()
    join_domain(settings, patience_s=20.0).close()
    timer.join()


def test_waking_a_reader_needs_no_server(server: RedisServer, domain: RedisDomain) -> None:
    reader = domain.create_mailbox("box")
    server.kill()
    timer = threading.Timer(0.1, reader.wake)
    timer.start()
    start = time.monotonic()
    assert reader.receive(19) == []
    assert time.monotonic() - start < 10
    timer.join()


def test_an_unknown_outcome_is_not_taken_for_a_repetition(
    server: RedisServer, domain: RedisDomain
) -> None:
    impatient = RedisDomain("d", server.url, patience_s=0.05)
    reader, sender = domain.create_mailbox("box"), impatient.open_mailbox("box")
    sender.send(b"1")
    server.kill()
    with pytest.raises(StoreUnavailable):
        sender.send(b"lost, and said so")
    server.start()
    sender.send(b"2")
    got: list[bytes] = []
    eventually(lambda: got.extend(reader.receive(0.1)) or b"2" in got)
    assert got == [b"1", b"2"]
    impatient.close()


def test_a_wrong_password_fails_at_once_and_is_never_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    require_redis()
    server = RedisServer(tmp_path, password="right")
    server.start()
    url = server.url.replace("right", "wr0ng")
    caplog.set_level(logging.DEBUG)
    start = time.monotonic()
    with pytest.raises(StoreUnavailable, match="password") as e:
        RedisDomain("d", url, patience_s=30)
    assert time.monotonic() - start < 10
    assert "wr0ng" not in str(e.value) + caplog.text
    server.kill()


def test_a_bad_url_is_a_setting_to_correct() -> None:
    for url in ("http://user:s3cret@host", "nonsense", "redis://host:notaport", "redis://[bad"):
        with pytest.raises(ConfigError, match="--redis-url") as e:
            RedisLink(url, 1)
        assert "s3cret" not in str(e.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:s3cret@host:1234/2", "redis://host:1234/2"),
        ("rediss://user:s3cret@host/0", "rediss://user@host/0"),
        ("redis://host/0?password=s3cret", "redis://host/0"),
        ("unix://:s3cret@/run/redis.sock?db=1", "unix:///run/redis.sock"),
    ],
)
def test_a_shown_url_has_no_password(url: str, shown: str) -> None:
    assert without_password(url) == shown


def test_unlink_removes_every_key_and_no_other_domains(
    server: RedisServer, domain: RedisDomain
) -> None:
    other = RedisDomain("d2", server.url)
    for each in (domain, other):
        each.metadata().register_instance(RECORD, 60)
        each.metadata().record_assignment("r", "i", 60)
        each.create_mailbox("box")
        each.open_mailbox("box").send(b"x")
    domain.unlink()
    keys = domain._link.client.keys("*")
    assert keys and all(key.startswith(b"aegaeon:{d2}:") for key in keys)
    other.unlink()
    assert domain._link.client.keys("*") == []
    other.close()


def test_wakes_nobody_reads_do_not_pile_up(domain: RedisDomain) -> None:
    reader = domain.create_mailbox("box")
    for _ in range(50):
        reader.wake()
    assert domain._link.client.xlen(reader._bell) == 1


def test_what_was_read_gives_its_room_back_exactly(domain: RedisDomain) -> None:
    reader, sender = domain.create_mailbox("box"), domain.open_mailbox("box")
    for n in range(700):
        sender.send(bytes(n))
    while reader.receive(0.05, max_records=300):
        pass
    assert domain._link.client.hget(reader._key, "held") == b"0"
    assert domain._link.client.xlen(reader._stream) == 0


def test_what_a_dead_process_leaves_expires(domain: RedisDomain) -> None:
    store, reader = domain.metadata(), domain.create_mailbox("box")
    store.register_instance(RECORD, 60)
    store.record_assignment("r", "i", 60)
    domain.open_mailbox("box").send(b"x")
    reader.wake()
    assert reader.receive(5) == [b"x"]
    reader.receive(0)
    client = domain._link.client
    kept = {key for key in client.keys("*") if client.pttl(key) < 0}
    assert kept == {b"aegaeon:{d}:instances"}  # ids, of which a look at the table drops dead ones
