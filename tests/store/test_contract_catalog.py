"""The catalogue of a domain, over all stores: the same for all, changed by one at a time."""

import fcntl
import threading

import msgspec
import pytest

from aegaeon.config import check_settings
from aegaeon.errors import StoreUnavailable
from aegaeon.keeper import bounds_of
from aegaeon.specs import Catalog
from aegaeon.store.catalog import FileCatalogStore
from aegaeon.store.codec import decode_catalog
from tests.store.conftest import OpenDomain
from tests.support.specs import make_spec


def named(name, **changes):
    return msgspec.structs.replace(make_spec(name), **changes)


def test_nobody_has_written_any(domain):
    assert domain.catalog().read() == Catalog()


def test_what_one_process_writes_all_read(open_domain: OpenDomain):
    one, other = open_domain().catalog(), open_domain().catalog()
    bounds = bounds_of(check_settings({"max_open": 4, "request_timeout_s": 3.0}))
    wanted = Catalog(models=(named("a", aliases=("b",)),), bounds=bounds, complaint="so")
    written = one.change(lambda _: wanted)
    assert written == msgspec.structs.replace(wanted, version=1)
    assert other.read() == one.read() == written
    other.change(lambda catalog: catalog.with_model(named("c")))
    assert [spec.id for spec in one.read().models] == ["a", "c"]
    assert one.read().version == 2
    assert open_domain().catalog().read() == one.read()


def test_what_stays_the_same_is_not_written(domain):
    catalog = domain.catalog()
    catalog.change(lambda before: before.with_model(named("a")))
    assert catalog.change(lambda before: before.with_model(named("a"))).version == 1


def test_a_change_of_something_older_is_none(domain):
    catalog = domain.catalog()
    first = catalog.change(lambda before: before.with_model(named("a")))
    newer = msgspec.structs.replace(first, version=2, complaint="newer")
    assert catalog.swap(1, newer)
    assert not catalog.swap(1, msgspec.structs.replace(first, version=2, complaint="late"))
    assert catalog.read() == newer


def test_changes_at_once_are_all_kept(open_domain: OpenDomain):
    stores = [open_domain().catalog() for _ in range(4)]

    def add(store, start):
        for number in range(start, 40, 4):
            store.change(lambda before, n=number: before.with_model(named(f"m{n}")))

    threads = [
        threading.Thread(target=add, args=(store, start)) for start, store in enumerate(stores)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    catalog = stores[0].read()
    assert {spec.id for spec in catalog.models} == {f"m{number}" for number in range(40)}
    assert catalog.version == 40


def test_an_error_of_the_change_changes_nothing(domain):
    catalog = domain.catalog()

    def fail(_):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        catalog.change(fail)
    assert catalog.read() == Catalog()


def test_models_are_found_by_all_their_names_and_replaced_by_their_id():
    catalog = Catalog().with_model(named("a", aliases=("x", "y"))).with_model(named("b"))
    assert catalog.find("y").id == "a" and catalog.find("b").id == "b"
    assert catalog.find("z") is None
    replaced = catalog.with_model(named("a", is_draining=True))
    assert [spec.id for spec in replaced.models] == ["a", "b"]
    assert replaced.find("a").is_draining and replaced.find("x") is None
    assert [spec.id for spec in replaced.without_model("a").models] == ["b"]


def test_other_bytes_are_no_catalogue():
    with pytest.raises(Exception, match="not a catalogue of models"):
        decode_catalog(b"\x93abc")


def test_a_lock_that_nobody_gives_back_is_not_waited_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr("aegaeon.store.catalog.LOCK_S", 0.05)
    store = FileCatalogStore(tmp_path, "d")
    assert store.swap(0, Catalog(version=1))
    (lock,) = tmp_path.glob("*lock")
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StoreUnavailable, match=r"keeps .*lock locked"):
            store.swap(1, Catalog(version=2))
        assert store.read().version == 1
    assert store.swap(1, Catalog(version=2))
