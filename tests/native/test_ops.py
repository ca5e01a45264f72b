"""What the operators' bindings refuse: all that the operators themselves take on trust."""

import subprocess
import sys

import pytest
import torch

from aegaeon import _native

POOL = _native.ThreadPool(2)
# Layers, KV heads, head_dim; one block of them is 4 pages.
SHAPE = (1, 2, 8)
PAGES = torch.zeros(4, 16, 8)


def make_rows(shape=SHAPE, sequences=((0, 3, 0, (0,)),), kv_type=0):
    return _native.PagedRows((PAGES.data_ptr(), len(PAGES), kv_type), shape, sequences)


def test_keys_and_values_of_a_type_that_only_cuda_has_are_refused():
    rows = make_rows(kv_type=2)
    x = torch.zeros(3, 16)
    operand, out = (x.data_ptr(), 16), torch.empty(3, 16)
    with pytest.raises(ValueError, match="float16 keys and values are for CUDA"):
        _native.append_kv(POOL, rows, 0, 3, operand, operand)
    with pytest.raises(ValueError, match="float16 keys and values are for CUDA"):
        _native.attend(POOL, rows, 0, (x.data_ptr(), 3, 2), 1.0, out.data_ptr())
    with pytest.raises(ValueError, match="type 3 of the KV is none of 0, 1, 2"):
        make_rows(kv_type=3)


@pytest.mark.parametrize("shape", [(0, 2, 8), (1, 0, 8), (1, 2, 0)])
def test_a_shape_without_anything_in_it_is_refused(shape):
    with pytest.raises(ValueError, match="must be at least 1"):
        make_rows(shape)


@pytest.mark.parametrize("bad", [(1 << 63, 3, 0, (0,)), (0, 1 << 63, 1 << 63, (0,))])
def test_positions_that_would_wrap_around_are_refused(bad):
    with pytest.raises(ValueError, match="less than"):
        make_rows(sequences=(bad,))


def test_fewer_rows_than_the_sequences_have_are_refused():
    rows = make_rows(sequences=((2, 3, 0, (0,)),))
    x = torch.zeros(5, 2 * 8)
    out = torch.empty(5, 2 * 8)
    for count in (0, 4):
        with pytest.raises(ValueError, match=f"{count} rows are given, the sequences have 5"):
            _native.attend(POOL, rows, 0, (x.data_ptr(), count, 2), 1.0, out.data_ptr())
        operand = (x.data_ptr(), 16)
        with pytest.raises(ValueError, match=f"{count} rows are given, the sequences have 5"):
            _native.append_kv(POOL, rows, 0, count, operand, operand)
    _native.append_kv(POOL, rows, 0, 5, operand, operand)
    _native.attend(POOL, rows, 0, (x.data_ptr(), 5, 2), 1.0, out.data_ptr())


def test_a_product_of_no_columns_is_refused():
    x = torch.zeros(64)
    address = x.data_ptr() + -x.data_ptr() % 64
    with pytest.raises(ValueError, match="at least 1 column"):
        _native.linear(POOL, address, (1, 0), ((address, 1, 0, 0),), address)


# Stacks are address space: with little of it left some threads start, then one does not.
FEW_THREADS = """
import resource
from aegaeon import _native
page = resource.getpagesize()
taken = int(open("/proc/self/statm").read().split()[0]) * page
limit = taken + (256 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    _native.ThreadPool(1024)
except RuntimeError as error:
    print("refused:", error)
print(_native.ThreadPool(2).threads)
"""


def test_a_pool_that_the_system_gives_too_few_threads_is_refused_in_order():
    command = [sys.executable, "-c", FEW_THREADS]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("refused: ") and result.stdout.endswith("\n2\n")
