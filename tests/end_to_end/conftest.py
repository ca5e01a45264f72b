"""Small random checkpoints, one per family, made once for the whole directory."""

import pytest

from tests.support.checkpoints import make_checkpoint


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Directories of three different models, by name."""
    root = tmp_path_factory.mktemp("checkpoints")
    families = {"ada": "llama", "bob": "qwen2", "cleo": "qwen3"}
    return {
        name: make_checkpoint(root / name, family, seed=seed, max_position_embeddings=4096)
        for seed, (name, family) in enumerate(families.items())
    }
