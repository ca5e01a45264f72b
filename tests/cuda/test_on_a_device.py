"""What only a real device can tell; run there with `pytest -m cuda`."""

import ctypes
import multiprocessing
import random

import pytest
import torch

from aegaeon import _native
from aegaeon.config import Settings
from aegaeon.engine.open import open_engine
from aegaeon.errors import DeviceError
from aegaeon.models.references import resolve
from aegaeon.types import Load, Loaded
from tests.support.checkpoints import make_checkpoint
from tests.support.decoder import make_request
from tests.support.regions import own_regions
from tests.support.runner import Runner

MIB = 1 << 20
GB = 1e9
WIDTHS = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64}


def why_not() -> str:
    """Return why no device can be used here; nothing where one can."""
    try:
        count = _native.count_cuda_devices()
    except DeviceError as error:
        return str(error)
    if count == 0:
        return "there is no CUDA device here"
    return "" if torch.cuda.is_available() else "torch here was built without CUDA"


WHY_NOT = why_not()
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "there is one")]


def random_bytes(size, seed=0):
    return torch.frombuffer(bytearray(random.Random(seed).randbytes(size)), dtype=torch.uint8)


@pytest.mark.parametrize("is_pinned", [True, False])
def test_bytes_go_out_and_come_back(is_pinned):
    device = _native.CudaDevice(0)
    memory, engine = device.allocate(64 * MIB), device.copy_engine(4 * MIB)
    source, target = random_bytes(64 * MIB), torch.zeros(64 * MIB, dtype=torch.uint8)
    if is_pinned:
        assert device.pin(source.data_ptr(), len(source)) == ""
    came = engine.submit([(memory.address, source.data_ptr(), len(source))], priority=0)
    assert came.wait(timeout_s=20.0), came.failure
    went = engine.submit([(target.data_ptr(), memory.address, len(target))], is_outward=True)
    assert went.wait(timeout_s=20.0), went.failure
    assert torch.equal(source, target)
    engine.close()
    device.unpin(source.data_ptr())


def test_memory_moves_down_over_itself():
    device = _native.CudaDevice(0)
    memory, engine = device.allocate(16 * MIB), device.copy_engine(4 * MIB)
    content, shift = random_bytes(16 * MIB), 4096
    target = torch.zeros(16 * MIB - shift, dtype=torch.uint8)
    size = len(target)
    came = engine.submit([(memory.address, content.data_ptr(), len(content))])
    moved = engine.submit([(memory.address, memory.address + shift, size)], after=[came])
    went = engine.submit(
        [(target.data_ptr(), memory.address, size)], after=[moved], is_outward=True
    )
    assert went.wait(timeout_s=20.0), (came.failure, moved.failure, went.failure)
    assert torch.equal(target, content[shift:])
    engine.close()


def _receive(handle, size, results):
    device = _native.CudaDevice(0)
    peer, memory, engine = (
        device.open(handle, size), device.allocate(size), device.copy_engine(MIB)
    )  # fmt: skip
    taken = engine.submit([(memory.address, peer.address, size)], priority=0)
    found = (ctypes.c_char * size)()
    out = engine.submit(
        [(ctypes.addressof(found), memory.address, size)], after=[taken], is_outward=True
    )
    results.put(bytes(found) if out.wait(timeout_s=20.0) else taken.failure or out.failure)
    engine.close()


def test_another_process_takes_what_a_handle_names():
    device, content = _native.CudaDevice(0), random_bytes(MIB)
    memory, engine = device.allocate(MIB), device.copy_engine(MIB)
    assert engine.submit([(memory.address, content.data_ptr(), MIB)]).wait(timeout_s=20.0)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    receiver = context.Process(target=_receive, args=(memory.handle(), MIB, results))
    receiver.start()
    assert results.get(timeout=60) == content.numpy().tobytes()
    receiver.join(20)
    engine.close()


def tokens_of(name, specs):
    largest_gb = max(spec.weight_bytes for spec in specs) / GB
    settings = Settings(
        device=name,
        threads_per_instance=1,
        model_cache_budget_gb=3 * largest_gb,
        kv_budget_gb=0.05,
        device_memory_gb=0.05 + 1.2 * largest_gb if name != "cpu" else 0,
    )
    with own_regions() as regions:
        engine = open_engine(settings, specs, regions)
        runner, before = Runner(engine), ()
        for spec in (*specs, *specs):
            assert isinstance(engine.load(Load(spec.id, evict=before)), Loaded)
            before = (spec.id,)
            turn = len(runner.tokens)
            runner.submit(make_request(f"{turn}", list(range(3, 60)), spec.id, max_tokens=16))
            runner.finish()
        engine.close()
    assert runner.failures == {}
    return runner.tokens


def test_models_that_take_turns_make_the_cpus_tokens(tmp_path):
    families = ("llama", "qwen2", "qwen3")
    paths = [make_checkpoint(tmp_path / family, family, **WIDTHS) for family in families]
    specs = tuple(resolve(str(path), str(tmp_path)) for path in paths)
    assert tokens_of("cuda:0", specs) == tokens_of("cpu", specs)
