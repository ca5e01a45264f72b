"""The emulation that the kernels' tests run on: what it must refuse, and its half types; and what a
device is told before a launch."""

import ctypes
import math

import pytest
import torch

from tests.support.emulated import library, set_schedule


def misuse(kind: int, threads: int = 64, shared_bytes: int = 64) -> str:
    return library().misuse(kind, threads, ctypes.c_size_t(shared_bytes)).decode()


MISUSES = [
    "",
    "deadlock: 63 threads in __syncthreads, 0 among lanes, 1 returned in block (0, 0, 0)",
    "__syncthreads after some threads have returned in block (0, 0, 0)",
    "lanes of a warp wait for unlike things in block (0, 0, 0)",
    "a shuffle of some lanes only in block (0, 0, 0)",
    "an asynchronous copy is not aligned to 16 bytes in block (0, 0, 0)",
    "a thread returned with copies in flight in block (0, 0, 0)",
]


@pytest.mark.parametrize("kind", range(len(MISUSES)))
def test_what_is_undefined_on_a_device_ends_the_launch_with_its_name(kind):
    set_schedule(0, True)
    assert misuse(kind) == MISUSES[kind]
    set_schedule(0, False)
    assert misuse(0) == ""


def test_what_no_device_has_is_refused():
    assert misuse(0, threads=48) == "blocks of 48 threads"
    assert misuse(0, threads=2048) == "blocks of 2048 threads"
    assert misuse(0, shared_bytes=164 << 10) == "167936 bytes of shared memory"


def test_a_device_is_told_once_how_much_shared_memory_a_kernel_has():
    asked = [  # device, kernel, bytes, whether that is refused
        (0, 16, 50_000, 1),
        (0, 16, 50_000, 0),
        (0, 16, 50_000, 0),
        (0, 16, 49_500, 0),
        (0, 16, 60_000, 0),
        (1, 16, 50_000, 0),
        (0, 32, 50_000, 0),
        (0, 16, 60_000, 1),
    ]
    operand, told = torch.tensor(asked), torch.zeros(len(asked), dtype=torch.int64)
    places = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (operand, told)]
    library().ask_allowances(places[0], ctypes.c_int64(len(asked)), places[1])
    assert told.tolist() == [2, 1, 0, 0, 1, 1, 1, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_rounded_as_torch_rounds_them(dtype):
    bits = torch.randint(-(1 << 31), 1 << 31, (20_000,), generator=torch.Generator().manual_seed(1))
    special = [
        0.0,
        -0.0,
        65504.0,
        65519.9,
        65520.0,
        2.0**-24,
        2.0**-25,
        3 * 2.0**-25,
        6.1e-5,
        -1e-7,
    ]
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    near = torch.tensor([*special, math.inf, -math.inf, 1.00390625, 1.01171875, 3.4e38])
    x = torch.cat((bits.to(torch.int32).view(torch.float32), every, near)).contiguous()
    x = x[~x.isnan()].contiguous()
    halves, widened = torch.zeros(len(x), dtype=torch.int16), torch.zeros(len(x))
    places = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, halves, widened)]
    count, is_bf16 = ctypes.c_int64(len(x)), int(dtype == torch.bfloat16)
    library().round_halves(places[0], count, is_bf16, places[1], places[2])
    expected = x.to(dtype)
    assert torch.equal(halves, expected.view(torch.int16))
    assert torch.equal(widened, expected.float())
