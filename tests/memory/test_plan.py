"""Tiers and predicted times from a layout, with rates that the test gives."""

from pathlib import Path

import msgspec
import pytest

from aegaeon.config import Settings
from aegaeon.memory.budget import Budgets, NodeBudget, lay_out
from aegaeon.memory.machine import DiskRate, Machine
from aegaeon.memory.plan import Probes, make_plan, place
from aegaeon.models.references import describe_model
from tests.support.checkpoints import make_checkpoint
from tests.support.specs import make_spec

MACHINE = Machine(10_000_000_000, 10_000_000_000)


def make_node(cache: int, device: int = 0) -> NodeBudget:
    return NodeBudget(1, Budgets(cache, kv_bytes=0, threads=1, device_weight_bytes=device))


def test_models_take_the_nearest_tier_with_room_in_order():
    specs = [make_spec(name, size) for name, size in (("a", 50), ("b", 60), ("c", 40), ("d", 5))]
    tiers = place(specs, make_node(cache=100, device=60))
    assert tiers == {"a": "device", "b": "disk", "c": "memory", "d": "device"}
    assert set(place(specs, make_node(cache=1000)).values()) == {"memory"}


def test_the_same_files_lie_in_the_cache_once():
    one = make_spec("a", 60)
    specs = [one, msgspec.structs.replace(one, id="b"), make_spec("c", 60)]
    assert place(specs, make_node(cache=100)) == {"a": "memory", "b": "memory", "c": "disk"}


def test_the_same_files_as_int8_lie_there_beside():
    one = make_spec("a", 60)
    specs = [one, msgspec.structs.replace(one, id="b", quantize="int8", weight_bytes=30)]
    assert place(specs, make_node(cache=80)) == {"a": "memory", "b": "disk"}
    assert place(specs, make_node(cache=90)) == {"a": "memory", "b": "memory"}


def no_copy() -> float:
    raise AssertionError("nothing asks for it")


@pytest.fixture
def spec(tmp_path):
    return describe_model(make_checkpoint(tmp_path / "a", "llama"))


def probes(copy=no_copy) -> Probes:
    return Probes(lambda path: DiskRate(1e6, path.suffix == ".safetensors"), copy)


def plan_of(spec, probes, **changes):
    settings = Settings(model_cache_budget_gb=0.1, kv_budget_gb=0.01, **changes)
    return make_plan(settings, [spec], lay_out(settings, [spec], MACHINE), MACHINE, probes)


def test_on_the_cpu_nothing_moves_between_cache_and_device(spec):
    plan = plan_of(spec, probes())
    model = plan.models[0]
    assert plan.link_bytes_per_s is None
    assert (model.tier, model.to_device_s, model.kv_in_s, model.warm_switch_s) == (
        "memory",
        0,
        0,
        0,
    )
    size = sum(file.stat().st_size for file in Path(spec.path).glob("*.safetensors"))
    assert 0.9 * size < model.file_bytes <= size
    assert model.cold_switch_s == model.from_disk_s == model.file_bytes / 1e6
    assert model.disk.is_direct


def test_on_a_staged_device_bytes_go_over_the_link(spec):
    plan = plan_of(spec, probes(), device="staged", link_gb_per_s=0.5)
    model = plan.models[0]
    assert plan.link_bytes_per_s == 5e8 and not plan.is_link_measured
    assert model.to_device_s == spec.weight_bytes / 5e8
    assert model.sequence_tokens == min(spec.context_tokens, model.kv_tokens)
    assert model.kv_out_s == model.kv_in_s == model.sequence_tokens * spec.kv_token_bytes / 5e8
    assert model.warm_switch_s == pytest.approx(model.to_device_s + 2 * model.kv_in_s)
    assert model.cold_switch_s == pytest.approx(model.warm_switch_s + model.from_disk_s)
    measured = plan_of(spec, probes(lambda: 7e9), device="staged")
    assert measured.link_bytes_per_s == 7e9 and measured.is_link_measured


def test_only_whole_blocks_of_tokens_fit(spec):
    model = plan_of(spec, probes()).models[0]
    assert model.kv_tokens % 16 == 0
    room = 10_000_000 - model.kv_tokens * spec.kv_token_bytes
    assert 0 <= room < 16 * spec.kv_token_bytes


def test_a_file_is_measured_once(spec):
    measured = []

    def disk(path):
        measured.append(path)
        return DiskRate(1e6, True)

    settings = Settings(model_cache_budget_gb=0.1, kv_budget_gb=0.01)
    specs = [spec, msgspec.structs.replace(spec, id="again")]
    node = lay_out(settings, specs, MACHINE)
    make_plan(settings, specs, node, MACHINE, Probes(disk, no_copy))
    assert len(measured) == 1
