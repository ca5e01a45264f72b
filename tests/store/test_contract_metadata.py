"""What every MetadataStore promises (aegaeon/store/base.py)."""

import threading
import time
from collections.abc import Callable

import pytest

from aegaeon.errors import StaleIncarnation
from aegaeon.store.base import Domain
from aegaeon.types import InstanceRecord, InstanceStatus
from tests.support.polling import eventually


def record(name: str = "instance-0", incarnation: int = 1, mailbox: str = "") -> InstanceRecord:
    return InstanceRecord(
        id=name,
        incarnation=incarnation,
        role="colocated",
        device="cpu",
        mailbox=mailbox or f"{name}.{incarnation}",
        pid=1,
        models=("a", "b"),
    )


def test_a_registered_instance_is_seen_by_everyone_as_starting(
    open_domain: Callable[[], Domain],
) -> None:
    open_domain().metadata().register_instance(record(), 60)
    (instance,) = open_domain().metadata().sync_for_routing()
    assert instance.record == record()
    assert instance.status == InstanceStatus()
    assert instance.status.state == "starting"


def test_status_updates_are_seen_whole(open_domain: Callable[[], Domain]) -> None:
    status = InstanceStatus(
        state="ready", current="a", resident=("a", "b"), waiting={"b": 3}, running={"a": 2}
    )
    writer, reader = open_domain().metadata(), open_domain().metadata()
    writer.register_instance(record(), 60)
    writer.update_instance_status("instance-0", 1, status)
    (instance,) = reader.sync_for_routing()
    assert instance.status == status
    assert instance.record == record()


def test_another_handle_may_update_the_status(open_domain: Callable[[], Domain]) -> None:
    open_domain().metadata().register_instance(record(), 60)
    open_domain().metadata().update_instance_status("instance-0", 1, InstanceStatus(state="ready"))
    (instance,) = open_domain().metadata().sync_for_routing()
    assert instance.status.state == "ready"


def test_instances_come_sorted_by_id(domain: Domain) -> None:
    store = domain.metadata()
    for name in ("c", "a", "b"):
        store.register_instance(record(name), 60)
    assert [instance.record.id for instance in store.sync_for_routing()] == ["a", "b", "c"]


def test_an_instance_vanishes_when_its_lease_ends(domain: Domain) -> None:
    store = domain.metadata()
    store.register_instance(record(), 0.05)
    eventually(lambda: store.sync_for_routing() == ())


def test_each_status_renews_the_lease(domain: Domain) -> None:
    store = domain.metadata()
    start = time.monotonic()
    store.register_instance(record(), 1.0)
    while time.monotonic() < start + 1.3:
        store.update_instance_status("instance-0", 1, InstanceStatus(state="ready"))
        assert len(store.sync_for_routing()) == 1
        time.sleep(0.05)


def test_a_status_after_the_lease_is_stale(domain: Domain) -> None:
    store = domain.metadata()
    store.register_instance(record(), 0.02)
    eventually(lambda: store.sync_for_routing() == ())
    with pytest.raises(StaleIncarnation):
        store.update_instance_status("instance-0", 1, InstanceStatus())
    assert store.sync_for_routing() == ()


def test_a_status_of_an_unknown_instance_is_stale(domain: Domain) -> None:
    with pytest.raises(StaleIncarnation):
        domain.metadata().update_instance_status("nobody", 1, InstanceStatus())


def test_an_instance_whose_lease_ended_may_register_again(domain: Domain) -> None:
    store = domain.metadata()
    store.register_instance(record(), 0.02)
    eventually(lambda: store.sync_for_routing() == ())
    store.register_instance(record(), 60)
    store.update_instance_status("instance-0", 1, InstanceStatus(state="ready"))
    assert len(store.sync_for_routing()) == 1


def test_a_newer_incarnation_replaces_the_older_one(open_domain: Callable[[], Domain]) -> None:
    old, new = open_domain().metadata(), open_domain().metadata()
    old.register_instance(record(incarnation=1), 60)
    old.update_instance_status("instance-0", 1, InstanceStatus(state="ready"))
    new.register_instance(record(incarnation=2), 60)
    (instance,) = old.sync_for_routing()
    assert instance.record.incarnation == 2
    assert instance.status.state == "starting"


def test_an_older_incarnation_can_neither_register_nor_publish_nor_remove(
    open_domain: Callable[[], Domain],
) -> None:
    old, new = open_domain().metadata(), open_domain().metadata()
    old.register_instance(record(incarnation=9), 60)
    new.register_instance(record(incarnation=10), 60)
    with pytest.raises(StaleIncarnation):
        old.register_instance(record(incarnation=9), 60)
    with pytest.raises(StaleIncarnation):
        old.update_instance_status("instance-0", 9, InstanceStatus(state="draining"))
    old.remove_instance("instance-0", 9)
    (instance,) = new.sync_for_routing()
    assert instance.record.incarnation == 10
    assert instance.status.state == "starting"


def test_a_status_of_an_incarnation_not_yet_registered_is_stale(domain: Domain) -> None:
    store = domain.metadata()
    store.register_instance(record(incarnation=1), 60)
    with pytest.raises(StaleIncarnation):
        store.update_instance_status("instance-0", 2, InstanceStatus())


def test_removing_takes_the_entry_out_and_twice_is_no_error(domain: Domain) -> None:
    store = domain.metadata()
    store.register_instance(record(), 60)
    store.remove_instance("instance-0", 1)
    store.remove_instance("instance-0", 1)
    assert store.sync_for_routing() == ()


def test_concurrent_statuses_are_never_torn(open_domain: Callable[[], Domain]) -> None:
    open_domain().metadata().register_instance(record(), 60)
    errors: list[BaseException] = []

    def publish(model: str) -> None:
        store = open_domain().metadata()
        status = InstanceStatus(state="ready", current=model, resident=(model,) * 40)
        try:
            for _ in range(100):
                store.update_instance_status("instance-0", 1, status)
        except BaseException as error:
            errors.append(error)

    writers = [threading.Thread(target=publish, args=(model * 30,)) for model in "ab"]
    for writer in writers:
        writer.start()
    reader = open_domain().metadata()
    while any(writer.is_alive() for writer in writers):
        (instance,) = reader.sync_for_routing()
        status = instance.status
        assert set(status.resident) <= {status.current}
    for writer in writers:
        writer.join()
    assert not errors


def test_of_many_registering_at_once_the_newest_stays(open_domain: Callable[[], Domain]) -> None:
    stores = [open_domain().metadata() for _ in range(8)]

    def register(incarnation: int) -> None:
        try:
            stores[incarnation - 1].register_instance(record(incarnation=incarnation), 60)
        except StaleIncarnation:
            return

    threads = [threading.Thread(target=register, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (instance,) = stores[0].sync_for_routing()
    assert instance.record.incarnation == 8


def test_an_assignment_is_found_until_it_expires(open_domain: Callable[[], Domain]) -> None:
    writer, reader = open_domain().metadata(), open_domain().metadata()
    assert reader.get_assignment("r1") is None
    writer.record_assignment("r1", "instance-0", 60)
    writer.record_assignment("r2", "instance-0", 0.02)
    assert reader.get_assignment("r1") == "instance-0"
    eventually(lambda: reader.get_assignment("r2") is None)
    assert reader.get_assignment("r1") == "instance-0"


def test_a_later_assignment_replaces_the_earlier_one(domain: Domain) -> None:
    store = domain.metadata()
    store.record_assignment("r1", "instance-0", 60)
    store.record_assignment("r1", "instance-1", 60)
    assert store.get_assignment("r1") == "instance-1"


def test_closing_keeps_what_the_store_holds_and_is_idempotent(
    open_domain: Callable[[], Domain],
) -> None:
    leaving = open_domain()
    store = leaving.metadata()
    store.register_instance(record(), 60)
    store.close()
    store.close()
    leaving.close()
    leaving.close()
    assert len(open_domain().metadata().sync_for_routing()) == 1


def test_unlinking_removes_everything_for_everyone(open_domain: Callable[[], Domain]) -> None:
    domain = open_domain()
    store = domain.metadata()
    store.register_instance(record(), 60)
    store.record_assignment("r1", "instance-0", 60)
    store.unlink()
    store.unlink()
    fresh = open_domain().metadata()
    assert fresh.sync_for_routing() == ()
    assert fresh.get_assignment("r1") is None
