"""Tests of operators: as they run in an engine, and on the best instructions unless they say so."""

import pytest
import torch

from aegaeon import _native


@pytest.fixture(autouse=True)
def _best_isa_afterwards():
    with torch.inference_mode():
        yield
    _native.force_isa("best")
