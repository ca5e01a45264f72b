"""What every Mailbox promises (aegaeon/store/base.py)."""

import threading
import time
from collections.abc import Callable

import pytest

from aegaeon.errors import AegaeonError, ConfigError, RecordTooLarge, RingClosed, RingFull
from aegaeon.store.base import Domain, Mailbox


def drain(mailbox: Mailbox, count: int) -> list[bytes]:
    got: list[bytes] = []
    deadline = time.monotonic() + 30
    while len(got) < count:
        assert time.monotonic() < deadline, f"{len(got)} of {count} records came"
        got += mailbox.receive(1.0)
    return got


def test_records_arrive_whole_and_in_order(open_domain: Callable[[], Domain]) -> None:
    reader = open_domain().create_mailbox("instance-0.3")
    sender = open_domain().open_mailbox("instance-0.3")
    records = [bytes([n % 256]) * (n * 7 % 500) for n in range(300)]
    for record in records:
        sender.send(record)
    assert drain(reader, 300) == records


@pytest.mark.parametrize("record", [b"", b"\0", bytes(range(256)) * 4096])
def test_any_bytes_up_to_one_mebibyte_are_a_record(domain: Domain, record: bytes) -> None:
    reader = domain.create_mailbox("box")
    domain.open_mailbox("box").send(record)
    assert reader.receive(5) == [record]


def test_a_record_over_one_mebibyte_is_too_large(domain: Domain) -> None:
    domain.create_mailbox("box")
    with pytest.raises(RecordTooLarge):
        domain.open_mailbox("box").send(bytes((1 << 20) + 1))


def test_a_record_over_the_capacity_is_too_large(domain: Domain) -> None:
    domain.create_mailbox("box", 4096)
    with pytest.raises(RecordTooLarge):
        domain.open_mailbox("box").send(bytes(4096))


@pytest.mark.parametrize("look_s", [0.0, 0.0001, 60.0])
def test_a_reader_is_woken_however_long_it_looks(domain: Domain, look_s: float) -> None:
    reader = domain.create_mailbox("box", look_s=look_s)
    sender = domain.open_mailbox("box")
    assert reader.receive(0.01) == []
    for n in range(20):
        later = threading.Timer(0.0005 * (n % 4), sender.send, [bytes([n])])
        later.start()
        assert drain(reader, 1) == [bytes([n])]
        later.join()


def test_at_most_as_many_records_come_as_asked_for(domain: Domain) -> None:
    reader = domain.create_mailbox("box")
    sender = domain.open_mailbox("box")
    for n in range(5):
        sender.send(bytes([n]))
    assert reader.receive(5, max_records=2) == [b"\0", b"\1"]
    assert reader.receive(5, max_records=2) == [b"\2", b"\3"]
    assert reader.receive(5, max_records=2) == [b"\4"]


def test_a_full_mailbox_refuses_and_takes_again_when_read(domain: Domain) -> None:
    reader = domain.create_mailbox("box", 4096)
    sender = domain.open_mailbox("box")
    sent = 0
    with pytest.raises(RingFull):
        while True:
            sender.send(bytes([sent]) * 500)
            sent += 1
    assert 6 <= sent <= 8
    assert drain(reader, sent) == [bytes([n]) * 500 for n in range(sent)]
    sender.send(b"again")
    assert reader.receive(5) == [b"again"]


def test_a_sender_waits_for_room(open_domain: Callable[[], Domain]) -> None:
    reader = open_domain().create_mailbox("box", 4096)
    sender = open_domain().open_mailbox("box")
    records = [bytes([n]) * 1000 for n in range(40)]

    def send_all() -> None:
        for record in records:
            sender.send(record, timeout_s=20)

    thread = threading.Thread(target=send_all)
    thread.start()
    assert drain(reader, 40) == records
    thread.join()


def test_waiting_for_room_ends_after_its_time(domain: Domain) -> None:
    domain.create_mailbox("box", 4096)
    sender = domain.open_mailbox("box")
    sender.send(bytes(3000))
    start = time.monotonic()
    with pytest.raises(RingFull):
        sender.send(bytes(3000), timeout_s=0.05)
    assert time.monotonic() - start >= 0.05


def test_receive_returns_empty_after_its_time(domain: Domain) -> None:
    reader = domain.create_mailbox("box")
    start = time.monotonic()
    assert reader.receive(0.05) == []
    assert time.monotonic() - start >= 0.045
    assert reader.receive(0) == []


def test_a_record_ends_the_wait(open_domain: Callable[[], Domain]) -> None:
    reader = open_domain().create_mailbox("box")
    sender = open_domain().open_mailbox("box")
    timer = threading.Timer(0.05, sender.send, args=(b"late",))
    timer.start()
    assert reader.receive(30) == [b"late"]
    timer.join()


def test_wake_ends_the_present_wait(domain: Domain) -> None:
    reader = domain.create_mailbox("box")
    timer = threading.Timer(0.05, reader.wake)
    timer.start()
    start = time.monotonic()
    assert reader.receive(30) == []
    assert time.monotonic() - start < 10
    timer.join()


def test_wake_ends_the_next_wait_and_only_that(domain: Domain) -> None:
    reader = domain.create_mailbox("box")
    reader.wake()
    reader.wake()
    start = time.monotonic()
    assert reader.receive(30) == []
    assert time.monotonic() - start < 10
    start = time.monotonic()
    assert reader.receive(0.1) == []
    assert time.monotonic() - start >= 0.09


def test_a_wake_does_not_hide_records(domain: Domain) -> None:
    reader = domain.create_mailbox("box")
    domain.open_mailbox("box").send(b"x")
    reader.wake()
    assert drain(reader, 1) == [b"x"]


def test_each_writers_records_keep_their_order(open_domain: Callable[[], Domain]) -> None:
    reader = open_domain().create_mailbox("box", 1 << 16)
    shared = open_domain().open_mailbox("box")
    senders = [shared, shared, *(open_domain().open_mailbox("box") for _ in range(2))]

    def send_all(writer: int) -> None:
        for number in range(150):
            senders[writer].send(b"%d %d" % (writer, number), timeout_s=30)

    threads = [threading.Thread(target=send_all, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    got = [tuple(map(int, record.split())) for record in drain(reader, 600)]
    for thread in threads:
        thread.join()
    for writer in range(4):
        assert [number for who, number in got if who == writer] == list(range(150))
    assert reader.receive(0) == []


def test_senders_get_closed_when_the_reader_has_closed(open_domain: Callable[[], Domain]) -> None:
    reader = open_domain().create_mailbox("box")
    sender = open_domain().open_mailbox("box")
    sender.send(b"x")
    reader.close()
    reader.close()
    with pytest.raises(RingClosed):
        sender.send(b"y")
    with pytest.raises(RingClosed):
        reader.receive(1)


def test_a_closed_sender_leaves_the_mailbox_to_others(open_domain: Callable[[], Domain]) -> None:
    reader = open_domain().create_mailbox("box")
    leaving, staying = open_domain().open_mailbox("box"), open_domain().open_mailbox("box")
    leaving.send(b"1")
    leaving.close()
    leaving.close()
    staying.send(b"2")
    assert drain(reader, 2) == [b"1", b"2"]


def test_a_full_mailbox_that_closes_ends_the_senders_wait(domain: Domain) -> None:
    reader = domain.create_mailbox("box", 4096)
    sender = domain.open_mailbox("box")
    sender.send(bytes(3000))
    timer = threading.Timer(0.05, reader.close)
    timer.start()
    with pytest.raises(RingClosed):
        sender.send(bytes(3000), timeout_s=30)
    timer.join()


def test_only_the_creator_receives(domain: Domain) -> None:
    domain.create_mailbox("box")
    with pytest.raises(AegaeonError):
        domain.open_mailbox("box").receive(0)


def test_opening_what_nobody_created_is_closed(domain: Domain) -> None:
    with pytest.raises(RingClosed):
        domain.open_mailbox("instance-7.1")


def test_a_left_over_is_replaced_by_an_empty_mailbox(open_domain: Callable[[], Domain]) -> None:
    open_domain().create_mailbox("box")
    old_sender = open_domain().open_mailbox("box")
    old_sender.send(b"for the dead")
    reader = open_domain().create_mailbox("box")
    assert reader.receive(0) == []
    with pytest.raises(RingClosed):
        old_sender.send(b"x")
    open_domain().open_mailbox("box").send(b"fresh")
    assert reader.receive(5) == [b"fresh"]


def test_unlink_spares_a_successor(open_domain: Callable[[], Domain]) -> None:
    old = open_domain().create_mailbox("box")
    new = open_domain().create_mailbox("box")
    old.unlink()
    old.unlink()
    open_domain().open_mailbox("box").send(b"x")
    assert new.receive(5) == [b"x"]


def test_after_unlink_the_address_is_unknown(open_domain: Callable[[], Domain]) -> None:
    reader = open_domain().create_mailbox("box")
    sender = open_domain().open_mailbox("box")
    reader.unlink()
    with pytest.raises(RingClosed):
        open_domain().open_mailbox("box")
    with pytest.raises(RingClosed):
        sender.send(b"x")


def test_unlinking_the_domain_closes_its_mailboxes(open_domain: Callable[[], Domain]) -> None:
    open_domain().create_mailbox("a")
    sender = open_domain().open_mailbox("a")
    open_domain().unlink()
    with pytest.raises(RingClosed):
        sender.send(b"x")
    with pytest.raises(RingClosed):
        open_domain().open_mailbox("a")


@pytest.mark.parametrize("address", ["", "../x", "a/b", ".hidden", "a+b", "a b", "x" * 101, "é"])
def test_an_address_is_never_a_path(domain: Domain, address: str) -> None:
    with pytest.raises(ConfigError, match="letters, digits"):
        domain.create_mailbox(address)
    with pytest.raises(ConfigError, match="letters, digits"):
        domain.open_mailbox(address)
