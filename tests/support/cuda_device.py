"""cuda:0 as tests have it: the machine's own, or this host that stands in for one.

A test of both is written once and knows nothing of which it has. It is collected twice: for the
stand-in, in every run, and with the marker `cuda`, which skips and says why where there is none.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor

from aegaeon import _native
from aegaeon._native import CopyEngine
from aegaeon.device.base import Device
from aegaeon.device.cuda import CudaOperators
from aegaeon.device.packed import Matrix
from aegaeon.engine import cuda as engine_cuda
from aegaeon.errors import DeviceError
from aegaeon.memory.area import Area
from tests.support.cuda_products import HostProducts, host_view
from tests.support.cuda_stand_in import EAGER, LAZY, RANDOM, cuda_device, put_in_place

STAND_IN, LATE, ANYHOW, DEVICE = "stand-in", "stand-in, late", "stand-in, anyhow", "cuda:0"
ORDERS = {STAND_IN: EAGER, LATE: LAZY, ANYHOW: RANDOM}
ON_DEVICE = pytest.param(DEVICE, marks=pytest.mark.cuda)
# What a test of both is collected for; those that wait for copies run in every order, too.
KINDS = (STAND_IN, ON_DEVICE)
COPYING_KINDS = (STAND_IN, LATE, ANYHOW, ON_DEVICE)
# Of a test that takes long on the stand-in.
LONG_KINDS = (pytest.param(STAND_IN, marks=pytest.mark.thorough), ON_DEVICE)
CPU = torch.device("cpu")


@functools.cache
def why_no_device(is_torch_needed: bool) -> str:
    """Return why a test cannot have a device here; nothing where it can. Our own copies and
    kernels do without a torch that has CUDA."""
    try:
        count = _native.count_cuda_devices()
    except DeviceError as error:
        return str(error)
    if count == 0:
        return "there is no CUDA device here"
    if is_torch_needed and not torch.cuda.is_available():
        return f"torch {torch.__version__} here has no CUDA"
    return ""


@contextmanager
def use_cuda(kind: str, is_torch_needed: bool = True) -> Iterator[None]:
    """Have all of aegaeon find the device of `kind` where it looks for CUDA. Skips the test where
    there is none."""
    if kind == DEVICE:
        if reason := why_no_device(is_torch_needed):
            pytest.skip(reason)
        yield
        return
    with cuda_device(ORDERS[kind]) as module, pytest.MonkeyPatch.context() as patch:
        put_in_place(module, patch)
        patch.setattr(engine_cuda, "view_of", host_view)
        products = HostProducts(module)
        patch.setattr(engine_cuda, "CudaOperators", partial(CudaOperators, products=products))
        yield


class Cuda:
    """A device with what tests of operators need of it. `kind` is how other processes get it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.device = _native.CudaDevice(0)
        self._engines: list[CopyEngine] = []
        self._operators: CudaOperators | None = None
        self._is_real = kind == DEVICE
        self._place = torch.device(DEVICE) if self._is_real else CPU

    def close(self) -> None:
        """Let go of the device, and of its engines before."""
        for engine in self._engines:
            engine.close()
        self._engines.clear()
        self._operators = None
        del self.device

    def copy_engine(self, chunk_bytes: int) -> CopyEngine:
        """Return an engine, which is closed with the device at the latest."""
        self._engines.append(self.device.copy_engine(chunk_bytes))
        return self._engines[-1]

    def operators(self) -> Device:
        """Return what computes there: one and the same, as an engine has it."""
        self._operators = self._operators or engine_cuda.CudaOperators(self.device)
        return self._operators

    def put(self, x: Tensor) -> Tensor:
        """Return `x` on the device, of which it is in place already."""
        there = x.to(self._place)
        self.settle()
        return there

    def get(self, x: Tensor) -> Tensor:
        """Return what `x` on the device holds once all has been computed."""
        self.settle()
        return x.cpu().clone()  # the stand-in has the device in this very memory

    def settle(self) -> None:
        """Wait for all that computes, ours and torch's."""
        self.device.synchronize()
        if self._is_real:
            torch.cuda.synchronize(self._place)

    def area(self, size_bytes: int) -> Area:
        """Return zeroed memory of the device, which copies may touch."""
        memory = self.device.allocate(size_bytes)
        return Area(engine_cuda.view_of(memory), memory)

    def matrix(self, weight: Tensor, dtype: torch.dtype) -> Matrix:
        """Return `weight` [out, in] as products on the device take it."""
        there = self.put(weight.to(dtype).contiguous())
        return Matrix(there, there.data_ptr(), *weight.shape, dtype)
