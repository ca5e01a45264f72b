"""Weights in a device's own arena: coming in beside compute, moved, dropped, lost and changed."""

import threading
from pathlib import Path

import pytest
import torch

from aegaeon._native import CopyEngine, WeightCache
from aegaeon.device.packed import unpack
from aegaeon.errors import BudgetTooSmall, WeightsEvicted
from aegaeon.memory.arena import Arena
from aegaeon.memory.host_model import Reading
from aegaeon.memory.source import WeightSource
from aegaeon.memory.staged import StagedWeights
from aegaeon.memory.traffic import Traffic
from aegaeon.models.checkpoint import EMBEDDING
from aegaeon.models.embedding_rows import EmbeddingRows
from aegaeon.models.references import resolve
from tests.support.checkpoints import make_checkpoint
from tests.support.held_copier import HeldCopier
from tests.support.polling import eventually
from tests.support.regions import own_regions

READERS = 2
# The last is larger than the others, by a quarter.
MODELS = {"a": {}, "b": {}, "c": {}, "d": {"intermediate_size": 160}}


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    paths = [make_checkpoint(root / n, seed=ord(n), **changes) for n, changes in MODELS.items()]
    return {path.name: resolve(str(path), str(root)) for path in paths}


@pytest.fixture
def regions():
    with own_regions() as regions:
        yield regions


@pytest.fixture
def open_weights(specs, regions):
    """Makes weights of a device with room for so many models like a, over one cache."""
    opened = []

    def open_one(models=2.5, copier=None, cached=5.5):
        size = specs["a"].weight_bytes
        cache = WeightCache.open_or_create(regions.weights, int(cached * size))
        copier = copier or CopyEngine(1, 1 << 16)
        traffic = Traffic()
        weights = StagedWeights(
            WeightSource(cache, tuple(specs.values()), Reading(READERS, traffic)),
            Arena(int(models * size)),
            copier,
            lambda _, packed: packed,
            traffic,
        )
        opened.append((weights, copier))
        return weights

    yield open_one
    for weights, copier in opened:
        weights.close()
        copier.close()


def content(weights, model):
    with weights.use(model) as packed:
        packed.stages.await_stage(packed.plan.stages - 1)
        return bytes(packed.memory.numpy())


def whole(weights, *models):
    """Bring models in, to the end; return their bytes."""
    for model in models:
        weights.bring_in(model, ())
        content(weights, model)
        eventually(lambda name=model: weights._models[name].arrival.is_complete)
    return {model: content(weights, model) for model in models}


def in_thread(work):
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_the_device_has_its_own_copy_which_outlives_the_caches(open_weights, specs):
    weights = open_weights(cached=1.2)
    before = whole(weights, "a", "b")
    assert weights._source.used_bytes < 2 * specs["a"].weight_bytes
    assert {model: content(weights, model) for model in "ab"} == before
    assert before["a"] != before["b"]


def test_a_step_begins_while_later_stages_still_come(open_weights):
    copier = HeldCopier()
    weights = open_weights(copier=copier)
    loader = in_thread(lambda: weights.bring_in("a", ()))
    plan, _ = weights._source._plans["a"].current()
    first_bytes = plan.stage_ends[0]
    eventually(lambda: sum(t.total_bytes for t in copier.tickets) == plan.total_bytes)
    assert "a" not in weights._models
    copier.let_in(first_bytes)
    loader.join(30)
    stages = []
    with weights.use("a") as packed:

        def step():
            for stage in range(plan.stages):
                packed.stages.await_stage(stage)
                stages.append(stage)

        computing = in_thread(step)
        eventually(lambda: len(stages) == 1)
        copier.let_in(plan.stage_ends[1] - first_bytes)
        eventually(lambda: len(stages) == 2)
        copier.let_in()
        computing.join(30)
    assert len(stages) == plan.stages


def with_first_stage(open_weights):
    """Have `a` all on its way, and its first stage on the device."""
    copier = HeldCopier()
    weights = open_weights(copier=copier)
    loader = in_thread(lambda: weights.bring_in("a", ()))
    plan, _ = weights._source._plans["a"].current()
    eventually(lambda: sum(t.total_bytes for t in copier.tickets) == plan.total_bytes)
    copier.let_in(plan.stage_ends[0])
    loader.join(30)
    return copier, weights, plan


def test_a_stage_on_its_way_is_read_from_the_cache(open_weights):
    copier, weights, plan = with_first_stage(open_weights)
    last, ids = plan.stages - 1, torch.tensor([9, 1])
    with weights.use("a") as packed:
        assert packed.stages.is_in(0) and not packed.stages.is_in(last)
        with packed.stages.cached(last) as memory:
            cached = bytes(memory)[: plan.total_bytes]
        # A version that no file has: what is found was not read there.
        path = plan.tensors[EMBEDDING].source.path
        plan.load_plan.files[path] = (0, 0, 0)
        places, rows = EmbeddingRows(plan, packed.stages).gather(ids)
        copier.let_in()
        packed.stages.await_stage(last)
        assert packed.stages.is_in(last) and bytes(packed.memory.numpy()) == cached
        assert torch.equal(unpack(rows)[places], unpack(packed.matrix(EMBEDDING))[ids])
        eventually(lambda: weights._models["a"].arrival.is_complete)
        eventually(lambda: not weights._models["a"].arrival._has_host)
        with packed.stages.cached(last) as memory:
            assert memory is None


def test_a_model_comes_in_while_another_one_computes(open_weights):
    weights = open_weights()
    whole(weights, "a")
    with weights.use("a") as packed:
        before = bytes(packed.memory.numpy())
        loader = in_thread(lambda: whole(weights, "b"))
        loader.join(30)
        assert not loader.is_alive()
        assert bytes(packed.memory.numpy()) == before


def test_a_model_dropped_while_it_comes_is_written_no_more(open_weights):
    copier, weights, _ = with_first_stage(open_weights)
    weights.drop("a")
    before = bytes(weights._arena.view)
    copier.let_in()
    assert bytes(weights._arena.view) == before
    assert weights.used_bytes == 0
    with pytest.raises(WeightsEvicted), weights.use("a"):
        pass


def test_models_move_together_when_only_gaps_are_left(open_weights):
    weights = open_weights(models=3.6)
    before = whole(weights, "a", "b", "c")
    weights.drop("a")
    assert weights._arena.get("c").offset > 0
    whole(weights, "d")
    assert weights._arena.get("c").offset == 0
    assert {model: content(weights, model) for model in "bc"} == {m: before[m] for m in "bc"}


def test_what_was_moved_is_built_anew_by_its_next_use_and_by_nobody_before(open_weights):
    weights = open_weights(models=3.6)
    before = whole(weights, "a", "b", "c")
    weights.drop("a")
    built, build = [], weights._build
    weights._build = lambda model, packed: built.append(model) or build(model, packed)
    whole(weights, "d")
    assert weights._arena.get("c").offset == 0 and built == ["d"]
    assert [content(weights, "c") for _ in range(2)] == [before["c"]] * 2
    assert built == ["d", "c"]


def test_what_computes_is_moved_after_its_step(open_weights):
    weights = open_weights(models=3.6)
    before = whole(weights, "a", "b", "c")
    weights.drop("a")
    tried, compact = [], weights._compact
    weights._compact = lambda size_bytes: tried.append(size_bytes) or compact(size_bytes)
    with weights.use("c") as packed, weights.use("b"):
        loader = in_thread(lambda: weights.bring_in("d", ()))
        eventually(lambda: len(tried) > 1)
        assert bytes(packed.memory.numpy()) == before["c"] and weights._arena.get("c").offset > 0
    loader.join(30)
    assert weights._arena.get("d") is not None
    assert content(weights, "c") == before["c"]


def test_a_compaction_that_fails_loses_what_it_moved_and_nothing_else(open_weights):
    copier = HeldCopier(is_open=True)
    weights = open_weights(models=3.6, copier=copier)
    before = whole(weights, "a", "b", "c")
    weights.drop("a")
    submit = copier.submit

    def submit_and_fail(segments, *args, **kwargs):
        copier.is_open = False
        ticket = submit(segments, *args, **kwargs)
        copier.fail("link down")
        return ticket

    copier.submit = submit_and_fail
    with pytest.raises(BudgetTooSmall, match="link down"):
        weights.bring_in("d", ())
    copier.submit, copier.is_open = submit, True
    with pytest.raises(WeightsEvicted), weights.use("c"):
        pass
    assert content(weights, "b") == before["b"]
    assert whole(weights, "c") == {"c": before["c"]}


def test_a_model_without_hope_of_room_is_refused_at_once_and_leaves_nothing(open_weights):
    weights = open_weights(models=2.1)
    before = whole(weights, "a", "b")
    used = weights.used_bytes
    with pytest.raises(BudgetTooSmall, match="--device-memory-gb"):
        weights.bring_in("c", ())
    assert weights.used_bytes == used and weights._arena.get("c") is None
    assert {model: content(weights, model) for model in "ab"} == before
    weights.bring_in("c", ("a",))


def test_a_model_lost_on_its_way_is_brought_in_anew(open_weights):
    copier, weights, plan = with_first_stage(open_weights)
    copier.fail("link down")
    with weights.use("a") as packed, pytest.raises(WeightsEvicted, match="link down"):
        packed.stages.await_stage(plan.stages - 1)
    eventually(lambda: weights._models["a"].arrival.is_lost)
    copier.is_open = True
    whole(weights, "a")


def test_a_use_that_waited_for_a_drop_finds_nothing(open_weights):
    weights = open_weights()
    whole(weights, "a")
    held = weights._models["a"]
    lock = held.lock

    class DroppedFirst:
        """Whoever waits here was overtaken."""

        def __enter__(self):
            held.lock = lock
            weights.drop("a")

        def __exit__(self, *_):
            pass

    held.lock = DroppedFirst()
    with pytest.raises(WeightsEvicted, match="left the device"), weights.use("a"):
        pass


def test_a_file_that_has_changed_is_another_model_here_too(open_weights, specs):
    weights = open_weights()
    before = whole(weights, "a")
    file = Path(specs["a"].path) / "model.safetensors"
    saved = file.read_bytes()
    try:
        file.write_bytes((Path(specs["b"].path) / "model.safetensors").read_bytes())
        assert whole(weights, "a") != before
    finally:
        file.write_bytes(saved)


def test_close_gives_up_everything_also_what_is_coming(open_weights):
    copier, weights, _ = with_first_stage(open_weights)
    weights.close()
    weights.close()
    assert weights.used_bytes == 0
    assert all(ticket.has_ended for ticket in copier.tickets)
