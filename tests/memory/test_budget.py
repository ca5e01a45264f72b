"""Budgets from settings, memory and cgroup, and the check at start-up."""

import subprocess
import sys

import pytest

from aegaeon.config import Settings
from aegaeon.device.processors import compute_threads
from aegaeon.errors import BudgetTooSmall
from aegaeon.memory.budget import available_memory_bytes, choose_budgets
from tests.support.decoder import make_spec

SPECS = (make_spec("a", weight_bytes=600_000_000), make_spec("b", weight_bytes=100))


def test_defaults_are_shares_of_the_memory_of_each_instance():
    budgets = choose_budgets(Settings(colocated_count=2), SPECS, memory_bytes=10_000_000_000)
    assert (budgets.weight_bytes, budgets.kv_bytes) == (3_000_000_000, 500_000_000)


def test_settings_win():
    settings = Settings(model_cache_budget_gb=1.5, kv_budget_gb=0.25, threads_per_instance=3)
    budgets = choose_budgets(settings, SPECS, memory_bytes=1)
    assert budgets.weight_bytes == 1_500_000_000
    assert budgets.kv_bytes == 250_000_000
    assert budgets.threads == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_cache_budget_gb": 0.5}, r"a needs 0\.600 GB.*0\.500 GB.*--model-cache-budget-gb"),
        ({"kv_budget_gb": 0.0001}, r"256 tokens of a need .*--kv-budget-gb"),
    ],
)
def test_a_budget_that_cannot_hold_a_model_is_refused_with_the_numbers(changes, message):
    with pytest.raises(BudgetTooSmall, match=message):
        choose_budgets(Settings(**changes), SPECS, memory_bytes=10_000_000_000)


def test_the_cgroup_limit_counts(tmp_path):
    whole = available_memory_bytes(tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory_bytes(tmp_path) == whole > 1 << 20
    (tmp_path / "memory.max").write_text("123456\n")
    assert available_memory_bytes(tmp_path) == 123456


def test_an_instance_always_has_a_thread():
    assert compute_threads(Settings(colocated_count=1000)) == 1


def test_null_engines_and_budgets_need_no_torch():
    code = (
        "import sys, aegaeon.engine.open, aegaeon.memory.budget; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
