"""What nvcc makes of the kernels: no warning, no spill, and no more of a device than is planned."""

from dataclasses import dataclass

import pytest

from tests.support.compiled_kernels import CAPABILITIES, blocks_at_once, compile_all
from tests.support.emulated import library


@dataclass(frozen=True)
class Budget:
    """Threads of a block, and at most so many registers a thread."""

    threads: int
    registers: int
    blocks: (
        int  # that a multiprocessor holds at least: with fewer, nothing hides what is waited for
    )


TYPES = ("float", "__nv_bfloat16", "__half")
# By name, with or without the template's arguments.
BUDGETS = {
    "attend_short": Budget(128, 128, 2),
    "attend_long": Budget(128, 208, 1),
    # All of 256 elements of float32 take half of the memory there is.
    "attend_short<float, 256>": Budget(128, 128, 1),
    **{f"attend_long<{dtype}, 256>": Budget(256, 208, 1) for dtype in TYPES},
    "join_splits": Budget(128, 40, 12),
    "norm_rows": Budget(256, 40, 6),
    "rotate_rows": Budget(256, 48, 5),
    "silu_mul_elements": Budget(256, 32, 8),
    "embed_elements": Budget(256, 32, 8),
    "finish_elements": Budget(256, 32, 8),
    "narrow_by_warps": Budget(256, 32, 8),
    "copy_blocks": Budget(256, 40, 6),
    "sample_rows": Budget(512, 96, 1),
}


# The build has the same gates against spills; what is more is for `make check-cuda`.
pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def kernels():
    return compile_all()


def budget_of(name: str) -> Budget | None:
    return BUDGETS.get(name, BUDGETS.get(name.partition("<")[0]))


def shared_bytes(name: str) -> int:
    return int(library().shared_bytes(name.encode()))


def test_every_kernel_is_there_for_every_target(kernels):
    names = {kernel.name for kernel in kernels}
    assert [name for name in names if budget_of(name) is None] == []
    assert len(kernels) == len(CAPABILITIES) * len(names)
    for kernel in ("attend_short", "attend_long"):
        for dtype in TYPES:
            for head_dim in (64, 96, 128, 256):
                assert f"{kernel}<{dtype}, {head_dim}>" in names


def test_nothing_is_spilled(kernels):
    assert [kernel for kernel in kernels if kernel.spilled_bytes or kernel.stack_bytes] == []


def test_kernels_keep_to_their_budgets(kernels, record_property):
    over = []
    for kernel in kernels:
        budget = budget_of(kernel.name)
        shared = shared_bytes(kernel.name)
        blocks = blocks_at_once(kernel, budget.threads, shared)
        line = (
            f"{kernel.name:36} sm_{kernel.capability} {kernel.registers:4} registers"
            f" {shared:7} bytes shared {blocks:3} x {budget.threads} threads"
            f" {100 * blocks * budget.threads // 2048:4} % occupied"
        )
        record_property("cuda kernel", line)
        if kernel.registers > budget.registers or blocks < budget.blocks:
            over.append(line)
    assert over == []
