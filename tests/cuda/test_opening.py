"""What cuda:0 must be and have before models are opened on it, told by the stand-in for it."""

import pytest
import torch

from aegaeon import _native
from aegaeon.config import Settings
from aegaeon.engine.cuda import check_device, open_cuda_engine
from aegaeon.errors import DeviceError
from aegaeon.memory.kv import KvShape
from aegaeon.models.references import resolve
from tests.support.checkpoints import make_checkpoint
from tests.support.cuda_stand_in import EAGER, cuda_device
from tests.support.regions import own_regions

AMPERE_SHARED, GAMING_SHARED = 163 << 10, 99 << 10


@pytest.fixture
def stand_in():
    with cuda_device(EAGER) as module:
        yield module


@pytest.fixture(autouse=True)
def attention(stand_in, monkeypatch):
    monkeypatch.setattr(
        _native, "cuda_attend_shared_bytes", stand_in.cuda_attend_shared_bytes, raising=False
    )


def check(stand_in, head_dim, dtype):
    check_device(stand_in.CudaDevice(0), {"ada": KvShape(2, 1, head_dim, dtype)})


def test_a_device_older_than_the_kernels_is_refused(stand_in):
    stand_in.set_capability(7, 5, 64 << 10)
    with pytest.raises(DeviceError, match=r"capability 7\.5, the kernels need 8\.0.*--device cpu"):
        check(stand_in, 64, torch.bfloat16)
    stand_in.set_capability(8, 0, AMPERE_SHARED)
    check(stand_in, 64, torch.bfloat16)


def test_keys_and_values_too_wide_for_a_blocks_memory_are_refused(stand_in):
    stand_in.set_capability(8, 6, GAMING_SHARED)
    with pytest.raises(DeviceError, match=r"heads of 128, .*--kv-dtype bfloat16"):
        check(stand_in, 128, torch.float32)
    check(stand_in, 128, torch.bfloat16)
    check(stand_in, 64, torch.float32)
    with pytest.raises(DeviceError, match=r"heads of 256, .*--device cpu"):
        check(stand_in, 256, torch.float32)
    stand_in.set_capability(8, 0, AMPERE_SHARED)
    for head_dim in (128, 256):
        check(stand_in, head_dim, torch.float32)


def test_kernels_take_what_they_are_compiled_with():
    """The figure is the launch's own: all heads and types fit a data centre's device."""
    for head_dim in (64, 96, 128, 256):
        taken = [_native.cuda_attend_shared_bytes(head_dim, code) for code in (0, 1, 2)]
        assert taken[1] == taken[2] < taken[0] <= AMPERE_SHARED
    with pytest.raises(ValueError, match="no kernel attends with a head_dim of 80"):
        _native.cuda_attend_shared_bytes(80, 0)


def test_a_driver_too_old_is_told_with_both_versions(stand_in):
    stand_in.set_driver(12040)
    with pytest.raises(DeviceError, match=r"is for CUDA 12\.4, and this build needs one for CUDA"):
        stand_in.CudaDevice(0)
    stand_in.set_driver(0)
    with pytest.raises(DeviceError, match="there is no NVIDIA driver here"):
        stand_in.count_cuda_devices()


def test_the_server_looks_before_it_opens(stand_in, monkeypatch, tmp_path):
    monkeypatch.setattr(_native, "CudaDevice", stand_in.CudaDevice)
    stand_in.set_capability(7, 0, 96 << 10)
    widths = {"hidden_size": 128, "num_attention_heads": 2, "head_dim": 64}
    specs = (resolve(str(make_checkpoint(tmp_path / "ada", **widths)), str(tmp_path)),)
    with own_regions() as regions, pytest.raises(DeviceError, match=r"capability 7\.0"):
        open_cuda_engine(Settings(device="cuda:0"), specs, regions)
