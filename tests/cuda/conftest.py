"""Devices that the same tests run on: see tests/support/cuda_device.py."""

import pytest

from tests.support.cuda_device import COPYING_KINDS, KINDS, Cuda, use_cuda


@pytest.fixture(params=KINDS)
def cuda(request):
    """A device whose operators compute, torch's products among them."""
    with use_cuda(request.param):
        opened = Cuda(request.param)
        yield opened
        opened.close()


@pytest.fixture(params=COPYING_KINDS)
def copying(request):
    """A device that copies, in every order that a runtime may choose; no torch need know it."""
    with use_cuda(request.param, is_torch_needed=False):
        opened = Cuda(request.param)
        yield opened
        opened.close()
