"""What a forward pass is estimated to hold."""

import json
import threading
from pathlib import Path

import pytest
import torch

from aegaeon import _native
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


@pytest.mark.parametrize("top_k", [0, 1000, (1 << 20) - 1])
def test_a_thread_keeps_no_more_for_sampling_than_is_counted(top_k):
    """However flat the logits are: all of them are as high as the k-th."""
    vocab = 1 << 20
    logits = torch.zeros(vocab)
    grown = []

    def draw() -> None:
        pool = _native.ThreadPool(1)  # the thread that calls
        draws = [(1.0, top_k, 0.9, 0.0, 7, 0)]
        before = resident_bytes()
        _native.sample(pool, logits.data_ptr(), (1, vocab), draws)
        grown.append(resident_bytes() - before)

    thread = threading.Thread(target=draw)
    thread.start()
    thread.join()
    assert sampling_bytes(vocab) / 4 < grown[0] < sampling_bytes(vocab) + SLACK_BYTES


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
