"""What a forward pass is estimated to hold."""

import json
import subprocess
import sys

import pytest

from aegaeon.memory.workspace import FLOAT_BYTES, MAX_PASS_ROWS, pass_bytes, sampling_bytes
from aegaeon.models.config import parse_config
from tests.support.checkpoints import make_config

# What else a thread touches for the first time.
SLACK_BYTES = 1 << 20


def test_a_pass_holds_its_widest_operand_once_more():
    """The copy of it that products are made from lies beside all that is alive together."""
    narrow, wide = (
        parse_config(json.dumps(make_config("llama", intermediate_size=size)).encode())
        for size in (10_000, 20_000)
    )
    each = FLOAT_BYTES * MAX_PASS_ROWS * (wide.intermediate_size - narrow.intermediate_size)
    inner = 1
    assert pass_bytes(wide) - pass_bytes(narrow) == (inner + 1) * each


# In a process of its own: memory that other tests have given back would be taken for none.
SAMPLER = """
import sys
import numpy
from aegaeon import _native
from aegaeon.memory.machine import resident_bytes

vocab, top_k = map(int, sys.argv[1:])
logits = numpy.zeros(vocab, numpy.float32)
logits += 0.0  # it is there
pool = _native.ThreadPool(1)  # the thread that calls
before = resident_bytes()
_native.sample(pool, logits.ctypes.data, (1, vocab), [(1.0, top_k, 0.9, 0.0, 7, 0)])
print(resident_bytes() - before)
"""


@pytest.mark.parametrize("top_k", [0, 1000, (1 << 20) - 1])
def test_a_thread_keeps_no_more_for_sampling_than_is_counted(top_k):
    """However flat the logits are: all of them are as high as the k-th."""
    vocab = 1 << 20
    command = [sys.executable, "-c", SAMPLER, str(vocab), str(top_k)]
    grown = int(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    assert sampling_bytes(vocab) / 4 < grown < sampling_bytes(vocab) + SLACK_BYTES
