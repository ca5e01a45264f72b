"""What an engine is opened with, and what is refused then."""

import pytest
import torch

from aegaeon.config import Settings
from aegaeon.engine import shared
from aegaeon.engine.regions import Regions
from aegaeon.engine.shared import check_capacity, open_cpu
from aegaeon.errors import BudgetTooSmall, ConfigError
from aegaeon.memory.budget import LEAST_SEQUENCES, Budgets
from aegaeon.memory.kv import KvPool, KvShape
from tests.support.specs import make_spec


def test_threads_that_the_system_does_not_give_are_a_setting_to_change(monkeypatch):
    def refuse(threads: int, activation_dtype: torch.dtype, neighbours: str, seat: int):
        raise RuntimeError("Resource temporarily unavailable")

    monkeypatch.setattr(shared, "CpuDevice", refuse)
    with pytest.raises(ConfigError, match=r"cannot start 900 .*unavailable.*--threads-per-inst"):
        open_cpu(Settings(), Budgets(weight_bytes=1, kv_bytes=1, threads=900), Regions("", ""))


def test_slabs_that_leave_less_than_a_sequence_are_refused():
    shapes = {"a": KvShape(3, 1, 64), "b": KvShape(7, 2, 16)}
    specs = (make_spec("a"), make_spec("b"))
    least = 16 * max(shape.block_bytes for shape in shapes.values())
    with pytest.raises(
        BudgetTooSmall, match=r"256 tokens of b need 16 blocks.* hold 12; raise --kv-budget-gb"
    ):
        check_capacity(KvPool(least, shapes.values()), specs, shapes)
    check_capacity(KvPool(LEAST_SEQUENCES * least, shapes.values()), specs, shapes)
