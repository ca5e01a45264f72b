"""Models of the node's cache in one process: what stays mapped between two uses, and what goes."""

import pytest

from aegaeon._native import WeightCache
from aegaeon.memory.source import WeightSource
from aegaeon.memory.traffic import Traffic
from aegaeon.models.references import resolve
from tests.support.checkpoints import make_checkpoint
from tests.support.polling import eventually
from tests.support.regions import own_regions


@pytest.fixture
def source(tmp_path):
    spec = resolve(str(make_checkpoint(tmp_path / "a", "llama")), str(tmp_path))
    with own_regions() as regions:
        cache = WeightCache.open_or_create(regions.weights, 2 * spec.weight_bytes)
        source = WeightSource(cache, (spec,), 2, Traffic())
        yield source
        source.close()


def opened_whole(source):
    host = source.open("a")
    host.await_stage(host.plan.stages - 1)
    return host


def test_a_model_that_was_taken_back_is_opened_without_mapping_it_again(source):
    host = opened_whole(source)
    source.take_back(host)
    assert source.open("a") is host


def test_a_model_that_was_taken_back_can_be_evicted_and_is_then_read_again(source):
    host = opened_whole(source)
    source.take_back(host)
    # The last stage is in a little before the load has ended.
    eventually(lambda: source._cache.evict(source._plans["a"].key))
    read = source._cache.bytes_read
    again = opened_whole(source)
    assert again is not host
    eventually(lambda: source._cache.bytes_read == 2 * read)
    again.close()


def test_a_model_that_is_not_whole_is_not_kept(source):
    host = source.open("a")
    host.interrupt()
    host._is_whole = False
    source.take_back(host)
    assert source._mapped == {}


def test_of_two_taken_back_one_is_kept(source):
    one, other = opened_whole(source), opened_whole(source)
    source.take_back(one)
    source.take_back(other)
    assert source.open("a") is other
    with pytest.raises(Exception, match="closed"):
        one.memory.pin()
    other.close()
