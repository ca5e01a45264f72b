"""What an instance tells of many models fits into a row of the shared table."""

import pytest

from aegaeon.errors import ConfigError, RegionMismatch
from aegaeon.measures import Speed
from aegaeon.specs import REFUSALS_BYTES, ROW_BYTES, check_room
from aegaeon.store.rows import RowWriter, SeenRow
from aegaeon.store.shm import ShmDomain
from aegaeon.types import InstanceRecord, InstanceStatus, ModelSpec
from tests.support.specs import make_spec


def named(count: int, chars: int) -> tuple[str, ...]:
    return tuple(f"{'n' * (chars - 5)}-{number:04d}" for number in range(count))


def record(models: tuple[str, ...]) -> InstanceRecord:
    return InstanceRecord(
        id="instance-0",
        incarnation=1,
        role="colocated",
        device="cpu",
        mailbox="instance-0.1",
        pid=1,
        models=models,
    )


def busy(models: tuple[str, ...]) -> InstanceStatus:
    """All of it that there can be to say."""
    return InstanceStatus(
        state="ready",
        current=models[0],
        resident=models,
        loading=models[1],
        waiting=dict.fromkeys(models, 70_000),
        running=dict.fromkeys(models, 70_000),
        joins=models,
        refused={"not served": "w" * REFUSALS_BYTES},
        speeds={model: Speed(0.1, 0.2) for model in models},
    )


def most(chars: int) -> int:
    """As many models of so long ids as a server takes."""
    specs: list[ModelSpec] = []
    with pytest.raises(ConfigError, match="serve fewer"):
        for name in named(10_000, chars):
            specs.append(make_spec(name))
            check_room(specs)
    return len(specs) - 1


@pytest.mark.parametrize(("chars", "least"), [(45, 1000), (160, 500), (6, 1500), (200, 400)])
def test_all_that_may_be_served_fit_with_everything_there_is_to_say(chars: int, least: int) -> None:
    count = most(chars)
    assert count >= least
    models = named(count, chars)
    writer = RowWriter()
    row, lease_s = writer.renewed(writer.entered(record(models), 8.0), busy(models))
    assert (lease_s, len(row) <= ROW_BYTES) == (8.0, True)
    seen = SeenRow(row).instance
    assert (seen.record, seen.status) == (record(models), busy(models))


def test_a_thousand_models_are_told_of_through_shared_memory(domain_name: str) -> None:
    domain, models = ShmDomain(domain_name), named(1000, 45)
    try:
        store, other = domain.metadata(), domain.metadata()
        store.register_instance(record(models), 60)
        store.update_instance_status("instance-0", 1, busy(models))
        (seen,) = other.sync_for_routing()
        assert (seen.record, seen.status) == (record(models), busy(models))
        store.register_instance(record(models[1:]), 60)  # numbers mean others from here on
        store.update_instance_status("instance-0", 1, busy(models[1:]))
        (seen,) = other.sync_for_routing()
        assert (seen.record, seen.status) == (record(models[1:]), busy(models[1:]))
    finally:
        domain.close()
        domain.unlink()


def test_models_that_the_record_has_not_keep_their_names() -> None:
    writer = RowWriter()
    status = InstanceStatus(resident=("b", "gone"), refused={"new": "why"}, waiting={"gone": 1})
    row, _ = writer.renewed(writer.entered(record(("a", "b")), 8.0), status)
    assert SeenRow(row).instance.status == status


def test_a_row_of_something_else_is_a_clear_error() -> None:
    with pytest.raises(RegionMismatch, match="one version"):
        SeenRow(b"\x93\x01\x02\x03")
