"""An instance's row: what does not fit in it never ends the instance."""

import pytest

from aegaeon.errors import RecordTooLarge, StaleIncarnation
from aegaeon.instance.presence import Presence
from aegaeon.store.local import LocalMetadataStore
from aegaeon.types import InstanceRecord, InstanceStatus

RECORD = InstanceRecord(
    id="i", incarnation=1, role="colocated", device="cpu", mailbox="i.1", pid=1, models=("a", "b")
)


class SmallStore(LocalMetadataStore):
    """Has room for two names."""

    def register_instance(self, record, lease_s):
        if len(record.models) > 2:
            raise RecordTooLarge("too many models")
        super().register_instance(record, lease_s)

    def update_instance_status(self, instance, incarnation, status):
        if len(status.resident) > 2:
            raise RecordTooLarge("too many models")
        super().update_instance_status(instance, incarnation, status)


def test_a_status_that_does_not_fit_is_told_without_its_models():
    store = SmallStore()
    presence = Presence(store, RECORD, 8.0, lambda: 0.0)
    full = InstanceStatus(state="ready", resident=("a", "b", "c"), load=3.0)
    presence.publish(full, 1.0)
    (row,) = store.sync_for_routing()
    assert (row.status.state, row.status.load, row.status.resident) == ("ready", 3.0, ())


def test_models_that_do_not_fit_leave_those_before_them_served():
    store = SmallStore()
    presence = Presence(store, RECORD, 8.0, lambda: 0.0)
    presence.serve(("a", "b", "c"))
    presence.publish(InstanceStatus(state="ready"), 1.0)
    (row,) = store.sync_for_routing()
    assert row.record == presence.record == RECORD
    assert row.status.state == "ready"


def test_who_was_replaced_still_learns_of_it():
    store = SmallStore()
    presence = Presence(store, RECORD, 8.0, lambda: 0.0)
    store.remove_instance("i", 1)
    with pytest.raises(StaleIncarnation):
        presence.publish(InstanceStatus(state="ready"), 1.0)
