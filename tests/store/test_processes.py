"""The stores that cross processes, from several real ones at once; and routing that stays cheap."""

import multiprocessing
import time
from collections.abc import Iterator

import pytest

from aegaeon.errors import RecordTooLarge, StaleIncarnation, TableFull
from aegaeon.store.base import Domain
from aegaeon.store.redis import RedisDomain
from aegaeon.store.shm import ASSIGNMENT_SLOTS, INSTANCE_SLOTS, ShmDomain
from aegaeon.types import InstanceRecord, InstanceStatus

WRITERS = 3
RECORDS = 150


def record(name: str, incarnation: int = 1) -> InstanceRecord:
    return InstanceRecord(
        id=name,
        incarnation=incarnation,
        role="colocated",
        device="cpu",
        mailbox=f"{name}.{incarnation}",
        pid=1,
        models=("m",),
    )


def open_by(kind: str, name: str, url: str) -> Domain:
    return ShmDomain(name) if kind == "shm" else RedisDomain(name, url, patience_s=30)


def work(kind: str, name: str, url: str, writer: int) -> None:
    """One writing process: fenced registrations, statuses, assignments and records."""
    domain = open_by(kind, name, url)
    store, mailbox = domain.metadata(), domain.open_mailbox("box")
    for incarnation in range(writer, 60, WRITERS):
        try:
            store.register_instance(record("contended", incarnation), 60)
            store.update_instance_status("contended", incarnation, InstanceStatus(state="ready"))
        except StaleIncarnation:
            continue
    for number in range(RECORDS):
        mailbox.send(b"%d %d" % (writer, number), timeout_s=30)
        store.record_assignment(f"request-{writer}-{number}", f"instance-{writer}", 60)
    domain.close()


@pytest.fixture(params=["shm", "redis"])
def where(request: pytest.FixtureRequest, domain_name: str) -> Iterator[tuple[str, str, str]]:
    url = request.getfixturevalue("redis_server").url if request.param == "redis" else ""
    yield request.param, domain_name, url
    domain = open_by(request.param, domain_name, url)
    domain.unlink()
    domain.close()


def test_processes_share_one_table_and_one_mailbox(where: tuple[str, str, str]) -> None:
    domain = open_by(*where)
    store, reader = domain.metadata(), domain.create_mailbox("box", 1 << 13)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(*where, writer)) for writer in range(WRITERS)]
    for worker in workers:
        worker.start()
    got: list[tuple[int, ...]] = []
    deadline = time.monotonic() + 60
    while len(got) < WRITERS * RECORDS:
        assert time.monotonic() < deadline
        got += [tuple(map(int, each.split())) for each in reader.receive(1.0)]
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    for writer in range(WRITERS):
        assert [n for who, n in got if who == writer] == list(range(RECORDS))
        assert store.get_assignment(f"request-{writer}-7") == f"instance-{writer}"
    (instance,) = store.sync_for_routing()
    assert instance.record.incarnation == 59
    assert instance.status.state == "ready"
    domain.close()


@pytest.fixture
def shm(domain_name: str) -> Iterator[ShmDomain]:
    domain = ShmDomain(domain_name)
    yield domain
    domain.unlink()
    domain.close()


def test_the_table_holds_a_bounded_number_of_assignments_after_many_routes(shm: ShmDomain) -> None:
    store = shm.metadata()
    for number in range(300_000):
        store.record_assignment(f"chatcmpl-{number:032d}", "instance-0", 600)
    held = len(store._assignments.items())
    assert ASSIGNMENT_SLOTS * 0.9 <= held <= ASSIGNMENT_SLOTS
    for number in range(299_000, 300_000):
        assert store.get_assignment(f"chatcmpl-{number:032d}") == "instance-0"


def test_the_node_has_a_bounded_number_of_instances(shm: ShmDomain) -> None:
    store = shm.metadata()
    for number in range(INSTANCE_SLOTS):
        store.register_instance(record(f"instance-{number}"), 60)
    with pytest.raises(TableFull):
        store.register_instance(record("one-more"), 60)
    store.remove_instance("instance-0", 1)
    store.register_instance(record("one-more"), 60)
    assert len(store.sync_for_routing()) == INSTANCE_SLOTS


def test_an_expired_instance_makes_room(shm: ShmDomain) -> None:
    store = shm.metadata()
    for number in range(INSTANCE_SLOTS):
        store.register_instance(record(f"instance-{number}"), 0.0)
    store.register_instance(record("one-more"), 60)
    assert [instance.record.id for instance in store.sync_for_routing()] == ["one-more"]


def test_a_status_that_names_hundreds_of_models_fits(shm: ShmDomain) -> None:
    names = tuple(f"organisation/some-model-{number}" for number in range(300))
    store = shm.metadata()
    store.register_instance(record("instance-0"), 60)
    status = InstanceStatus(resident=names, waiting=dict.fromkeys(names, 1))
    store.update_instance_status("instance-0", 1, status)
    assert store.sync_for_routing()[0].status == status


def test_an_id_over_64_bytes_is_refused(shm: ShmDomain) -> None:
    with pytest.raises(RecordTooLarge):
        shm.metadata().record_assignment("r" * 65, "instance-0", 60)
