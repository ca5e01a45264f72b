"""Races and accesses out of bounds: the sanitizers find none in the kernels, and each fault that is
put in is found, be it by them, by the emulation or by the results."""

import pytest

from tests.support.kernel_stress import (
    ADDRESS,
    THREAD,
    Mutant,
    run_stress,
)

# It takes long; `make check-cuda` and `make test-all` run it.
pytestmark = pytest.mark.thorough

SHORT, LONG, CALL = "attend_short.h", "attend_long.h", "attend_call.h"
LAUNCH, ROWS, BLOCK = "attend_launch.h", "cuda_rows_stress", "sampling_block.h"
ATTEND = "cuda_attend_stress"
SYNC = "__syncthreads();"
SHARED = "kShared = sizeof(ShortMemory<T, head_dim>)"


def without(source: str, before: str, after: str = "") -> Mutant:
    """A mutant without the one barrier that stands between the two."""
    return Mutant(source, before + SYNC + after, before + after)


# What is wrong: the program and the sanitizer that it must not get past.
MUTANTS = {
    "scores are read before all warps have written them": (
        *(ATTEND, THREAD),
        without(SHORT, "= highs.of[1];\n    "),
    ),
    "weights are read before all warps have written them": (
        *(ATTEND, THREAD),
        without(SHORT, "[lane % 4] = own.of[1];\n    "),
    ),
    "a stage is reused before all warps have read it": (
        *(ATTEND, THREAD),
        without(SHORT, "warp * (head_dim / kWarps), sums);\n    "),
    ),
    "what other threads copied is read before they say so": (
        *(ATTEND, THREAD),
        without(SHORT, "wait_copies<L::kStages - 1>();\n    "),
    ),
    "a long tile's stage is reused early": (
        *(ATTEND, THREAD),
        without(LONG, "rows.end_split(step / kSplit);\n    "),
    ),
    "lanes read weights that others have not written": (
        *(ATTEND, THREAD),
        Mutant(LONG, "__syncwarp();\n    add_values", "add_values"),
    ),
    "copies are not waited for": (
        *(ATTEND, ADDRESS),
        Mutant(LONG, "wait_copies<L::kStages - 1>", "wait_copies<L::kStages>"),
    ),
    "shared memory is too short": (
        *(ATTEND, ADDRESS),
        Mutant(LAUNCH, f"{SHARED};", f"{SHARED} - 64;"),
    ),
    "the block behind is read": (
        *(ATTEND, ADDRESS),
        Mutant(CALL, "first_block + position / kBlock", "first_block + position / kBlock + 1"),
    ),
    "a split is joined that was not made": (
        *(ATTEND, ADDRESS),
        Mutant(SHORT, "split * kSplit < seen", "split * kSplit <= seen + kSplit"),
    ),
    "warps' sums are added before they are written": (
        *(ROWS, THREAD),
        without("warp.h", "= value;\n  "),
    ),
    "a row goes to the token behind": (
        *(ROWS, ADDRESS),
        Mutant("rotate.cu", "std::size_t>(place.offset)", "std::size_t>(place.offset + 1)"),
    ),
    "the last piece of a block is too long": (
        *(ROWS, ADDRESS),
        Mutant("blocks.cu", "min(words, first + kPieceWords)", "first + kPieceWords"),
    ),
    "bins are counted up before they are cleared": (
        *(ROWS, THREAD),
        without(BLOCK, "memory.counts[bin] = 0;\n  }\n  "),
    ),
}


@pytest.mark.parametrize(
    ("program", "sanitizer"),
    [
        (ATTEND, THREAD),
        (ROWS, ADDRESS),
        pytest.param(ATTEND, ADDRESS, marks=pytest.mark.thorough),
        pytest.param(ROWS, THREAD, marks=pytest.mark.thorough),
    ],
)
def test_the_sanitizers_find_nothing_in_the_kernels(program, sanitizer):
    result = run_stress(program, sanitizer)
    assert (result.returncode, result.stdout) == (0, f"{program}: ok\n"), result.stderr[-3000:]


# The others are of the same kinds: `make check-cuda` runs them.
QUICK = {
    "copies are not waited for",
    "shared memory is too short",
    "warps' sums are added before they are written",
}


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.thorough) for name in MUTANTS],
)
def test_each_fault_that_is_put_in_is_found(name, tmp_path, record_property):
    program, sanitizer, mutant = MUTANTS[name]
    result = run_stress(program, sanitizer, mutant, tmp_path)
    assert result.returncode != 0 and result.stdout == "", "nobody saw that " + name
    record_property("cuda fault", name)
