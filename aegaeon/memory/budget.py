"""How much an instance may hold: from the settings, else from the machine's (or cgroup's) memory.

No torch here: the supervisor asks too.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from aegaeon.config import Settings
from aegaeon.device.processors import compute_threads
from aegaeon.errors import BudgetTooSmall
from aegaeon.types import ModelSpec

WEIGHT_SHARE = 0.6
KV_SHARE = 0.1
GB = 1e9
# The least a sequence is good for: a prompt and an answer of a few sentences.
LEAST_SEQUENCE_TOKENS = 256


class Budgets(msgspec.Struct, frozen=True):
    """What one instance may use."""

    weight_bytes: int
    kv_bytes: int
    threads: int


def choose_budgets(
    settings: Settings, specs: Sequence[ModelSpec], memory_bytes: int | None = None
) -> Budgets:
    """Return the budgets of one instance. Raises BudgetTooSmall with the numbers.

    `memory_bytes` is what all instances share; by default what this process may use.
    """
    share = (memory_bytes or available_memory_bytes()) / settings.instance_count
    budgets = Budgets(
        weight_bytes=int(settings.model_cache_budget_gb * GB or WEIGHT_SHARE * share),
        kv_bytes=int(settings.kv_budget_gb * GB or KV_SHARE * share),
        threads=compute_threads(settings),
    )
    check_budgets(budgets, specs)
    return budgets


def check_budgets(budgets: Budgets, specs: Sequence[ModelSpec]) -> None:
    """Raise BudgetTooSmall when some model's weights, or one sequence of it, can never fit."""
    for spec in specs:
        if spec.weight_bytes > budgets.weight_bytes:
            raise BudgetTooSmall(
                f"{spec.id} needs {_gb(spec.weight_bytes)} of weights, an instance may hold "
                f"{_gb(budgets.weight_bytes)}; raise --model-cache-budget-gb"
            )
        tokens = min(spec.context_tokens, LEAST_SEQUENCE_TOKENS)
        need = tokens * spec.kv_token_bytes
        if need > budgets.kv_bytes:
            raise BudgetTooSmall(
                f"{tokens} tokens of {spec.id} need {_gb(need)} of keys and values, an instance "
                f"may hold {_gb(budgets.kv_bytes)}; raise --kv-budget-gb"
            )


def available_memory_bytes(cgroup_root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return physical memory, or the cgroup's limit where that is less."""
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (cgroup_root / name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():  # "max" is no limit
            limit = min(limit, int(text))
    return limit


def _gb(count: int) -> str:
    return f"{count / GB:.3f} GB"
