"""Models that come to an engine that is open compute as if they had always been there."""

import time

import msgspec
import pytest

from aegaeon.engine.open import open_engine
from aegaeon.engine.regions import Regions
from aegaeon.errors import AegaeonError, BudgetTooSmall, InvalidRequest
from aegaeon.models.config import read_config
from aegaeon.models.references import resolve
from tests.engine.test_checkpoints import DEVICES, SETTINGS
from tests.support.checkpoints import make_checkpoint
from tests.support.decoder import load_in_thread, make_request
from tests.support.polling import eventually
from tests.support.regions import own_regions
from tests.support.runner import Runner


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    small = make_checkpoint(root / "small", "llama", seed=1)
    other = make_checkpoint(root / "other", "qwen3", seed=2, num_hidden_layers=3, head_dim=64)
    deep = make_checkpoint(root / "deep", "llama", num_hidden_layers=96, head_dim=256)
    return tuple(resolve(str(path), str(root)) for path in (small, other, deep))


@pytest.fixture(params=DEVICES)
def settings(request):
    return msgspec.structs.replace(SETTINGS, **DEVICES[request.param])


def sizes(*specs):
    configs = [read_config(spec.path) for spec in specs]
    return tuple((one.layers, one.kv_heads, one.head_dim) for one in configs)


def answers(engine, model):
    load_in_thread(engine, model)
    runner = Runner(engine)
    runner.submit(
        *(make_request(f"{model}{n}", range(3, 40 + n), model=model, max_tokens=12) for n in (0, 9))
    )
    return runner.finish()


def test_a_model_that_came_later_makes_the_same_tokens(settings, specs):
    small, other, _ = specs
    with own_regions() as regions:
        engine = open_engine(settings, (small, other), regions)
        expected = {model: answers(engine, model) for model in (small.id, other.id)}
        engine.close()
    with own_regions() as plain:
        regions = Regions(plain.weights, plain.kv, sizes(small), sizes(*specs))
        engine = open_engine(settings, (small,), regions)
        second = open_engine(settings, (small,), regions)
        assert answers(engine, small.id) == expected[small.id]
        for _ in range(2):
            engine.begin_model(other)
            assert answers(engine, other.id) == expected[other.id]
            assert answers(engine, small.id) == expected[small.id]
            engine.end_model(other.id)
            assert engine.usage().kv_bytes == 0
        with pytest.raises(InvalidRequest):
            engine.submit(make_request("late", [3], model=other.id))
        # One that opens when there are more joins the same memory.
        third = open_engine(settings, (small, other), regions)
        assert answers(third, other.id) == expected[other.id]
        for one in (engine, second, third):
            one.close()


def test_one_that_does_not_fit_is_refused_with_the_numbers_and_leaves_nothing(settings, specs):
    small, other, _ = specs
    with own_regions() as plain:
        regions = Regions(plain.weights, plain.kv, sizes(small), ())
        engine = open_engine(settings, (small,), regions)
        with pytest.raises(BudgetTooSmall, match=r"takes \d+ bytes of keys and values .*slabs of"):
            engine.begin_model(other)
        huge = msgspec.structs.replace(small, id="huge", weight_bytes=10**12)
        with pytest.raises(BudgetTooSmall, match=r"needs 1000.000 GB of weights"):
            engine.begin_model(huge)
        gone = msgspec.structs.replace(small, id="gone", path=small.path + "-gone")
        with pytest.raises(AegaeonError, match="cannot read"):
            engine.begin_model(gone)
        for model in (other.id, "huge", "gone"):
            engine.end_model(model)
            with pytest.raises(InvalidRequest):
                engine.submit(make_request("r", [3], model=model))
        assert answers(engine, small.id)
        engine.close()


def test_shapes_of_which_no_block_fits_are_left_out(settings, specs):
    small, _, deep = specs
    with own_regions() as plain:
        regions = Regions(plain.weights, plain.kv, sizes(small), sizes(deep))
        engine = open_engine(settings, (small,), regions)
        with pytest.raises(BudgetTooSmall):
            engine.begin_model(deep)
        assert answers(engine, small.id)
        engine.close()


def test_one_that_is_let_go_leaves_device_and_cache_unless_another_wants_it(settings, specs):
    small, other, _ = specs
    with own_regions() as regions:
        engine = open_engine(settings, (small, other), regions)
        second = open_engine(settings, (small, other), regions)
        expected = answers(engine, small.id)
        cache = engine._shelf.source._cache

        def held():
            return [one.model for one in cache.status()]

        second.submit(make_request("wants", [3], model=small.id))
        load_in_thread(second, small.id)
        engine.let_go(small.id, 0.0)
        time.sleep(0.3)
        assert held() == [small.id]
        second.release("wants")
        second.let_go(small.id, 1e6)
        time.sleep(0.3)
        assert held() == [small.id]  # it was used a moment ago
        engine.let_go(small.id, 0.0)
        eventually(lambda: held() == [], 10.0)
        eventually(lambda: engine.usage().cached == (), 10.0)
        assert settings.has_own_memory is False or engine.usage().weight_bytes == 0
        assert answers(engine, small.id) == expected
        for one in (engine, second):
            one.close()
