"""A small model and its text, for tests of what follows a grammar."""

import pytest

from aegaeon.models.references import resolve
from aegaeon.proxy.tokenizer import TextModel
from tests.support.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    path = make_checkpoint(root / "m", "llama", max_position_embeddings=1024)
    return resolve(str(path), str(root))


@pytest.fixture(scope="module")
def text(spec):
    return TextModel(spec.path)
