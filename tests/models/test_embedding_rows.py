"""Rows of an embedding whose stage is not in: from the cache, from the file, or not at all."""

import os
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aegaeon.device.cpu import CpuDevice
from aegaeon.device.packed import unpack
from aegaeon.errors import WeightsEvicted
from aegaeon.models import embedding_rows
from aegaeon.models.checkpoint import EMBEDDING, plan_load
from aegaeon.models.embedding_rows import EmbeddingRows
from aegaeon.models.layers import Decoder
from aegaeon.models.packing import PackPlan, plan_pack
from tests.support.checkpoints import make_checkpoint
from tests.support.coming import Coming
from tests.support.dense_device import DenseDevice, dense_batch

IDS = torch.tensor([389, 0, 31, 32, 389, 7, 0, 388])


def make_plan(directory: Path, **overrides) -> PackPlan:
    return plan_pack(plan_load(make_checkpoint(directory, "llama", vocab_size=390, **overrides)))


@pytest.fixture
def plan(tmp_path: Path) -> PackPlan:
    return make_plan(tmp_path / "m")


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32)


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_cached", [False, True])
def test_rows_are_those_of_the_whole_embedding_to_the_bit(tmp_path, dtype, is_cached, quantize):
    directory = make_checkpoint(tmp_path, "llama", dtype=dtype, vocab_size=390, hidden_size=80)
    stored = load_file(directory / "model.safetensors")
    large = float("inf") if quantize == "none" else 6e4
    stored[EMBEDDING][7, :4] = torch.tensor([-0.0, large, 1e-7, -1e-7]).to(dtype)
    save_file(stored, directory / "model.safetensors")
    coming = Coming(plan_pack(plan_load(directory), quantize))
    coming.is_cached = is_cached
    device = CpuDevice()
    places, rows = EmbeddingRows(coming.plan, coming).gather(IDS)
    assert rows.out_features == 6
    assert rows.dtype == (dtype if quantize == "none" else torch.float32)
    expected = device.embed(IDS, coming.whole.matrix(EMBEDDING))
    assert torch.equal(bits(device.embed(places, rows)), bits(expected))
    assert coming.awaited == []


@pytest.mark.parametrize("is_cached", [False, True])
def test_rows_of_a_matrix_row_by_row_are_rows(tmp_path, is_cached):
    directory = make_checkpoint(tmp_path, "llama", dtype=torch.bfloat16, vocab_size=390)
    coming = Coming(plan_pack(plan_load(directory), layout="rows"))
    coming.is_cached = is_cached
    places, rows = EmbeddingRows(coming.plan, coming).gather(IDS)
    stored = load_file(directory / "model.safetensors")[EMBEDDING]
    assert torch.equal(rows.owner[places], stored[IDS])
    assert rows.address == rows.owner.data_ptr() and rows.dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("is_cached", [False, True])
def test_a_step_computes_without_waiting_for_the_embedding(tmp_path, tied, is_cached):
    coming = Coming(make_plan(tmp_path / "m", tie_word_embeddings=tied))
    coming.is_cached = is_cached
    config = coming.plan.load_plan.config
    expected = Decoder(config, DenseDevice(), coming.whole).forward(dense_batch([5, 6, 5]))
    decoder = Decoder(config, DenseDevice(), coming.weights)
    assert torch.equal(decoder.forward(dense_batch([5, 6, 5])), expected)
    assert coming.awaited == list(range(config.layers + 1))


def waits_for_the_stage(coming: Coming, ids: torch.Tensor = IDS) -> bool:
    """Whether a step waits for the embedding, which it then computes with."""
    stage = coming.plan.tensors[EMBEDDING].stage
    decoder = Decoder(coming.plan.load_plan.config, DenseDevice(), coming.weights)
    whole = Decoder(coming.plan.load_plan.config, DenseDevice(), coming.whole)
    batch = dense_batch(ids.tolist())
    assert torch.equal(decoder.forward(batch), whole.forward(batch))
    return coming.awaited[0] == stage


def test_a_file_that_is_gone_is_waited_for(plan):
    coming = Coming(plan)
    Path(plan.tensors[EMBEDDING].source.path).unlink()
    assert waits_for_the_stage(coming)


def test_a_file_that_has_changed_is_waited_for(plan):
    coming = Coming(plan)
    os.utime(plan.tensors[EMBEDDING].source.path, ns=(1, 1))
    assert waits_for_the_stage(coming)


def test_a_file_that_changes_while_it_is_read_is_waited_for(plan, monkeypatch):
    coming = Coming(plan)
    pread = os.pread

    def pread_and_change(file: int, size: int, offset: int) -> bytes:
        os.utime(plan.tensors[EMBEDDING].source.path, ns=(1, 1))
        return pread(file, size, offset)

    monkeypatch.setattr(os, "pread", pread_and_change)
    assert waits_for_the_stage(coming)


def test_reads_that_fail_or_end_are_waited_for(plan, monkeypatch):
    def fail(*_) -> bytes:
        raise OSError(5, "Input/output error")

    for pread in (fail, lambda *_: b""):
        coming = Coming(plan)
        monkeypatch.setattr(os, "pread", pread)
        # Nobody has other reads than those of the rows here: the model is in memory.
        assert waits_for_the_stage(coming)


def test_short_reads_are_gone_on_with(plan, monkeypatch):
    coming = Coming(plan)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: pread(file, max(1, size // 2), at))
    assert not waits_for_the_stage(coming)


def test_a_disk_that_hangs_keeps_one_thread_and_no_step(plan, monkeypatch):
    coming, answers, reads = Coming(plan), threading.Event(), []
    pread = os.pread

    def hang(file: int, size: int, offset: int) -> bytes:
        reads.append(offset)
        answers.wait(60)
        return pread(file, size, offset)

    monkeypatch.setattr(os, "pread", hang)
    monkeypatch.setattr(embedding_rows, "READ_S", 0.0)
    rows = EmbeddingRows(plan, coming)
    assert rows.gather(IDS) is None and rows.gather(IDS) is None
    answers.set()
    assert rows._reading.has_ended(60)
    assert len(reads) == 6
    monkeypatch.setattr(embedding_rows, "READ_S", 60.0)
    assert rows.gather(IDS) is not None


def test_a_stage_that_comes_before_its_rows_is_computed_with(plan, monkeypatch):
    coming, answers = Coming(plan), threading.Event()
    monkeypatch.setattr(os, "pread", lambda *_: answers.wait(60) and b"")
    monkeypatch.setattr(embedding_rows, "READ_S", 60.0)
    rows = EmbeddingRows(plan, coming)
    coming.await_stage(plan.tensors[EMBEDDING].stage)
    assert rows.gather(IDS) is None
    answers.set()
    assert rows._reading.has_ended(60)


def test_a_system_without_threads_is_waited_for(plan, monkeypatch):
    def refuse(_) -> None:
        raise RuntimeError("can't start new thread")

    coming = Coming(plan)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert waits_for_the_stage(coming)


def test_a_cache_that_has_lost_the_model_is_passed_over(plan, monkeypatch):
    @contextmanager
    def cached(stage: int):
        raise WeightsEvicted("gone")
        yield

    coming = Coming(plan)
    monkeypatch.setattr(coming, "cached", cached)
    _, rows = EmbeddingRows(plan, coming).gather(torch.tensor([3]))
    assert torch.equal(unpack(rows)[0], unpack(coming.whole.matrix(EMBEDDING))[3])


def test_many_rows_are_waited_for(plan, monkeypatch):
    monkeypatch.setattr(embedding_rows, "MOST_ROWS", 5)
    assert waits_for_the_stage(Coming(plan))
    # The same id again is the same row.
    assert not waits_for_the_stage(Coming(plan), torch.tensor([1, 2, 3, 4, 5, 5, 1]))


@pytest.mark.parametrize("token", [-1, 390])
def test_ids_that_the_model_does_not_have_are_left_to_the_operator(plan, token):
    assert EmbeddingRows(plan, Coming(plan)).gather(torch.tensor([0, token])) is None
