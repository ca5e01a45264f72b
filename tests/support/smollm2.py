"""The demo checkpoint, for tests that want a real model; `make weights` makes it once."""

from pathlib import Path

import pytest

SMOLLM2_DIR = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"


def smollm2_directory() -> Path:
    """Return the directory of SmolLM2-135M-Instruct, or skip the test, saying how to get it."""
    if not (SMOLLM2_DIR / "config.json").is_file():
        pytest.skip("needs models/SmolLM2-135M-Instruct; run `make weights` once")
    return SMOLLM2_DIR
