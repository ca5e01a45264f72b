"""Operators, recorded steps and their thread pool under the sanitizers, on every instruction set
that is here."""

import itertools

import pytest

from tests.support.sanitized import CSRC, SANITIZERS, run_sanitized

# The first to need a program compiles it, maybe on a busy machine; programs have a limit of theirs.
pytestmark = pytest.mark.timeout(300)

SHARED = [CSRC / "shm" / f"{name}.cpp" for name in ("futex", "owner", "region")]
POOL = [CSRC / "ops" / "cpu" / f"{name}.cpp" for name in ("neighbours", "thread_pool")]
SOURCES = [
    source for part in ("ops", "ops/cpu") for source in sorted((CSRC / part).glob("*.cpp"))
] + SHARED


# To compile all operators once more takes as long as all the rest; `make test-all` does.
SLOW = {("ops_stress", "thread"), ("step_stress", "thread")}


@pytest.mark.parametrize(
    ("program", "sanitizer"),
    [
        pytest.param(*case, marks=pytest.mark.thorough if case in SLOW else ())
        for case in itertools.product(["ops_stress", "step_stress"], SANITIZERS)
    ],
)
def test_the_sanitizers_find_nothing_in_the_operators(program, sanitizer):
    run_sanitized(program, SOURCES, sanitizer)


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_sanitizers_find_nothing_in_the_thread_pool(sanitizer):
    run_sanitized("pool_stress", POOL + SHARED, sanitizer)
