"""What steps take of a CUDA device beside weights and KV, on the stand-in for one: that it is
enough, that what grows gives back what it was, and that models which come later find theirs."""

import json
from pathlib import Path

import msgspec
import pytest
import torch

from aegaeon import _native
from aegaeon.config import Settings
from aegaeon.device.base import Embedding
from aegaeon.device.cuda import CudaOperators
from aegaeon.device.packed import Matrix
from aegaeon.engine.cuda import Opening
from aegaeon.errors import BudgetTooSmall
from aegaeon.memory.budget import Budgets
from aegaeon.memory.cuda_room import room_bytes
from aegaeon.memory.workspace import MAX_PASS_ROWS
from aegaeon.models.config import read_config
from aegaeon.models.references import resolve
from tests.support.checkpoints import make_checkpoint
from tests.support.cuda_products import HostProducts
from tests.support.cuda_stand_in import EAGER
from tests.support.cuda_steps import WIDTHS, SteppedModel, on_stand_in, operators, row_weights
from tests.support.products import randn


@pytest.fixture
def eager(monkeypatch):
    with on_stand_in(EAGER, monkeypatch) as made:
        yield made


def spec_of(directory, **changes):
    made = make_checkpoint(directory, "llama", **(WIDTHS | changes))
    return resolve(str(made), str(directory.parent))


def total(rooms):
    return sum(room.size_bytes for room in
               (rooms.slots, rooms.result, rooms.upload, rooms.splits, rooms.draws))  # fmt: skip


def test_an_upload_with_the_rows_of_an_embedding_that_is_not_in_needs_no_more(tmp_path, eager):
    weights = row_weights(tmp_path, "llama", torch.bfloat16, max_position_embeddings=600)
    size = room_bytes((weights.plan.load_plan.config,), 1)
    device = CudaOperators(_native.CudaDevice(0), HostProducts(eager), size)
    model = SteppedModel(device, weights, (600,))
    table = randn(MAX_PASS_ROWS, WIDTHS["hidden_size"])  # as wide as a file may have them

    def cold(token_ids):
        rows = torch.arange(len(token_ids))
        return Embedding(rows, Matrix(table, table.data_ptr(), *table.shape, table.dtype), True)

    model.decoder._embed = cold
    model.step((0, 0, MAX_PASS_ROWS))
    device.compute.device.synchronize()
    rooms = device.compute.rooms
    assert rooms.upload.size_bytes == size.upload and rooms.total_bytes == size.total_bytes


def test_a_room_that_grows_gives_back_what_it_was(tmp_path, eager):
    """Whatever models have computed there before."""
    device = operators(eager)
    small, other, large = (
        SteppedModel(device, row_weights(tmp_path / name, "llama", torch.bfloat16, **changes), (9,))
        for name, changes in (("a", {}), ("b", {}), ("c", {"intermediate_size": 4096}))
    )
    expected = [model.step((0, 0, 4)).clone() for model in (small, other)]
    native, rooms = device.compute.device, device.compute.rooms
    free_bytes, taken = native.free_bytes, total(rooms)
    large.step((0, 0, 4))
    native.synchronize()
    assert total(rooms) == rooms.total_bytes > 2 * taken
    assert free_bytes - native.free_bytes == total(rooms) - taken
    for model, logits in zip((small, other), expected, strict=True):
        assert torch.equal(model.step((0, 0, 4)), logits)


def opened(eager, monkeypatch, *specs):
    monkeypatch.setattr(
        "aegaeon.engine.cuda.CudaOperators",
        lambda device, size: CudaOperators(device, HostProducts(eager), size),
    )
    configs = {spec.id: read_config(spec.path) for spec in specs}
    settings = Settings(device="cuda:0", max_batch=4)
    opening = Opening(_native.CudaDevice(0), settings, configs)
    operators = opening.open(settings, Budgets(weight_bytes=0, kv_bytes=0, threads=1))
    return opening, operators, settings


def test_models_that_come_later_need_no_more_than_is_free(tmp_path, eager, monkeypatch):
    small, wide = spec_of(tmp_path / "small"), spec_of(tmp_path / "wide", intermediate_size=4096)
    opening, operators, settings = opened(eager, monkeypatch, small)
    device = opening.device
    both = room_bytes(map(read_config, (small.path, wide.path)), settings.max_batch)
    rooms = operators.compute.rooms
    more = both.total_bytes - both.splits - rooms.total_bytes + rooms.splits.size_bytes
    taken = device.allocate(device.free_bytes - more + 1)
    with pytest.raises(
        BudgetTooSmall, match=r"steps of wide take 0\.0\d\d GB more of cuda:0 .* fr"
    ):
        opening.check(settings, (wide,))
    opening.check(settings, (small,))
    del taken
    taken = device.allocate(device.free_bytes - more)
    opening.check(settings, (wide,))
    # It is not there yet, but wanted: another one of its width needs nothing, a wider one too much.
    opening.check(settings, (msgspec.structs.replace(wide, id="twin"),))
    path = Path(wide.path) / "config.json"
    config = json.loads(path.read_text()) | {"intermediate_size": 4200}
    path.write_text(json.dumps(config))
    with pytest.raises(BudgetTooSmall, match="of wider take"):
        opening.check(settings, (msgspec.structs.replace(wide, id="wider"),))
    assert taken.size_bytes > 0
