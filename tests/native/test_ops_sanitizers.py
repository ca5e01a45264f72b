"""Operators and their thread pool under the sanitizers, on every instruction set that is here."""

import pytest

from tests.support.sanitized import CSRC, SANITIZERS, run_sanitized

SOURCES = [*sorted((CSRC / "ops" / "cpu").glob("*.cpp")), CSRC / "shm" / "futex.cpp"]


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_sanitizers_find_nothing_in_the_operators(sanitizer):
    run_sanitized("ops_stress", SOURCES, sanitizer)
