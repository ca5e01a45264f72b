"""The supervisor's side of the catalogue: written, kept, and drained models taken out."""

import msgspec
import pytest

from aegaeon.child import Child
from aegaeon.deaths import MAX_DEATHS, Death, Work, decode_deaths, name_of
from aegaeon.errors import RegionError, StoreUnavailable
from aegaeon.figures import ModelFigures, ProxyFigures, encode_figures
from aegaeon.instance.at_work import AtWork, memory
from aegaeon.keeper import (
    QUIET_S,
    SILENT_S,
    TEND_S,
    CatalogKeeper,
    DeathKeeper,
    kv_sizes,
    model_directories,
)
from aegaeon.placements import Abode, Placement
from aegaeon.specs import Catalog
from aegaeon.store.local import LocalBoard, LocalCatalogStore, LocalMetadataStore
from aegaeon.types import InstanceRecord, InstanceStatus
from tests.support.checkpoints import make_checkpoint
from tests.support.specs import make_spec

FIRST = Catalog(models=(make_spec("a"), make_spec("b")))
RECORD = InstanceRecord(
    id="i", incarnation=1, role="colocated", device="null", mailbox="i.1", pid=1, models=("a", "b")
)


class Kept:
    def __init__(self):
        self.store, self.metadata = LocalCatalogStore(), LocalMetadataStore(lambda: 0.0)
        self.metadata.register_instance(RECORD, 60.0)
        self.board = LocalBoard()
        self.keeper = CatalogKeeper(self.store, self.metadata, self.board, FIRST)
        self.now = 0.0

    def drain(self, model):
        def drained(catalog):
            spec = catalog.find(model)
            return catalog.with_model(msgspec.structs.replace(spec, is_draining=True))

        self.store.change(drained)

    def publish(self, **fields):
        self.metadata.update_instance_status("i", 1, InstanceStatus(state="ready", **fields))

    def tell(self, open_requests, beats=0):
        models = {"b": ModelFigures(open=open_requests)}
        figures = ProxyFigures(models=models, beats=beats)
        self.board.publish("proxy", encode_figures(figures))

    def tend(self, for_s):
        """Return the models after so long."""
        until_s = self.now + for_s
        while self.now < until_s:
            self.now += 1.01 * TEND_S
            self.keeper.tend(self.now)
        return [spec.id for spec in self.store.read().models]


def test_a_model_that_drains_goes_when_it_has_been_quiet_everywhere():
    kept = Kept()
    assert kept.tend(5) == ["a", "b"]
    kept.drain("b")
    for fields in ({"running": {"b": 1}}, {"waiting": {"b": 2}}, {"running": {"a": 1, "b": 1}}):
        kept.publish(**fields)
        assert kept.tend(5) == ["a", "b"]
    kept.publish(running={"a": 1})
    assert kept.tend(QUIET_S / 2) == ["a", "b"]
    kept.publish(running={"b": 1})  # one that was on its way
    assert kept.tend(5) == ["a", "b"]
    kept.publish(running={"a": 1})
    assert kept.tend(2 * QUIET_S) == ["a"]


def test_a_model_that_drains_stays_while_a_proxy_has_requests_that_no_instance_has():
    kept = Kept()
    kept.drain("b")
    for beats in range(10):
        kept.tell(1, beats)
        assert kept.tend(2 * QUIET_S) == ["a", "b"]
    kept.tell(0)
    assert kept.tend(2 * QUIET_S) == ["a"]


def test_a_proxy_that_died_keeps_no_model_for_long():
    kept = Kept()
    kept.drain("b")
    kept.tell(1)
    assert kept.tend(SILENT_S) == ["a", "b"]
    assert kept.tend(2 * QUIET_S) == ["a"]


def test_a_model_that_is_wanted_again_stays():
    kept = Kept()
    kept.drain("b")
    kept.tend(QUIET_S / 2)
    kept.store.change(lambda catalog: catalog.with_model(make_spec("b")))
    assert kept.tend(5) == ["a", "b"]


def test_what_the_store_has_forgotten_is_written_again_as_something_newer():
    kept = Kept()
    kept.drain("a")
    known = kept.keeper.current()
    kept.store._catalog = Catalog()
    again = kept.keeper.current()
    assert again == kept.store.read() and again.models == known.models
    assert again.version > known.version


def test_kinds_of_models_are_read_and_what_is_none_is_passed_over(tmp_path):
    make_checkpoint(tmp_path / "a", "llama")
    make_checkpoint(tmp_path / "b", "llama", seed=3)
    make_checkpoint(tmp_path / "c", "llama", num_hidden_layers=5, head_dim=32)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "empty").mkdir()
    found = model_directories(str(tmp_path))
    assert len(found) == 4
    sizes = kv_sizes(found)
    assert len(sizes) == 2 and (sizes[1][0], sizes[1][2]) == (5, 32)
    assert model_directories(str(tmp_path / "nowhere")) == ()


class Refusing(LocalBoard):
    """A board that raises `error` while there is one."""

    error = None

    def publish(self, name, record):
        if self.error is not None:
            raise self.error
        super().publish(name, record)


def dead(incarnation, request):
    """A child whose process has ended while it computed `request`."""
    child = Child("i", 0, incarnation=incarnation, work_fd=memory())
    AtWork(child.work_fd).compute("m", (request,))
    return child


def told(board):
    return decode_deaths(board.read()[name_of("i")])


def test_of_what_instances_died_stands_on_the_board_of_the_last_ones():
    board = Refusing()
    keeper = DeathKeeper(board)
    for life in range(1, MAX_DEATHS + 3):
        child = dead(life, f"r{life}")
        keeper.note(child)
        assert child.work_fd is None
        assert told(board)[-1] == Death(life, Work("m", (f"r{life}",)))
    assert [death.incarnation for death in told(board)] == [*range(3, MAX_DEATHS + 3)]
    keeper.note(Child("i", 0, incarnation=99))
    assert told(board)[-1] == Death(99, None)


def test_a_death_that_could_not_be_told_is_told_later():
    board = Refusing()
    keeper = DeathKeeper(board)
    board.error = StoreUnavailable("no answer")
    with pytest.raises(StoreUnavailable):
        keeper.note(dead(1, "r"))
    with pytest.raises(StoreUnavailable):
        keeper.tell()
    board.error = None
    keeper.tell()
    assert told(board) == (Death(1, Work("m", ("r",))),)
    # Where there is no room, the rest of what is to be done of a death must not wait for it.
    board.error = RegionError("no room")
    keeper.note(dead(2, "s"))
    board.error = None
    keeper.tell()
    assert [death.incarnation for death in told(board)] == [1, 2]
    keeper.note(dead(3, "t"))
    assert [death.incarnation for death in told(board)] == [1, 2, 3]


def test_a_placement_stands_in_the_catalogue_and_outlives_keeper_and_store():
    kept = Kept()
    placement = Placement(rule="load", abodes={"a": Abode(("x",))})
    kept.keeper.place(placement)
    found = kept.store.read()
    assert (found.placement, found.models, found.version) == (placement, FIRST.models, 2)
    kept.store._catalog = Catalog()  # the store has forgotten it
    assert kept.keeper.current().placement == placement
    assert kept.store.read().version == 3
    again = CatalogKeeper(kept.store, kept.metadata, kept.board, kept.store.read())
    assert again.current().placement == placement and kept.store.read().version == 3


def test_a_catalogue_that_began_anew_goes_on_behind_what_instances_have_seen():
    kept = Kept()
    kept.publish(catalog=7)
    kept.keeper.place(Placement(), kept.metadata.sync_for_routing())
    assert kept.store.read() == msgspec.structs.replace(FIRST, version=8, placement=Placement())
    assert kept.keeper.current().version == 8
