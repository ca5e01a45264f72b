"""Whether a tokenizer fits the weights beside it."""

import json

import pytest

from aegaeon.errors import CheckpointError
from aegaeon.models.references import resolve_all
from aegaeon.models.token_ids import OwnIds, read_own_ids_end
from tests.support.checkpoints import make_checkpoint

ROWS = 384


def with_tokenizer(directory, vocab, added=()):
    make_checkpoint(directory, "llama")
    file = directory / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"] = vocab
    tokenizer["added_tokens"] = [{"id": one, "content": f"<{one}>"} for one in added]
    file.write_text(json.dumps(tokenizer))
    return str(directory)


def numbered(*ids):
    return {f"t{one}": one for one in ids}


@pytest.mark.parametrize(
    ("vocab", "added"),
    [
        (numbered(0, ROWS - 1), ()),
        (numbered(0), ()),  # the other rows are padding
        (numbered(0, ROWS - 1), (ROWS, ROWS + 7)),  # came with training, and are in no text
        ([["a", -1.0]] * ROWS, ()),
        ({}, ()),
    ],
)
def test_one_that_fits_is_served(tmp_path, vocab, added):
    (spec,) = resolve_all([with_tokenizer(tmp_path / "m", vocab, added)], tmp_path)
    assert spec.vocab_tokens == ROWS


@pytest.mark.parametrize("vocab", [numbered(0, ROWS), [["a", -1.0]] * (ROWS + 1)])
def test_one_with_tokens_without_weights_is_refused(tmp_path, vocab):
    with pytest.raises(CheckpointError, match=f"up to {ROWS}, its weights only {ROWS} rows"):
        resolve_all([with_tokenizer(tmp_path / "m", vocab)], tmp_path)


def test_files_are_read_once_for_all_models(tmp_path, monkeypatch):
    directory = tmp_path / "m"
    with_tokenizer(directory, numbered(0))
    (tmp_path / "n").symlink_to(directory)
    read, own_ids = [], OwnIds()
    monkeypatch.setattr(
        "aegaeon.models.token_ids.read_own_ids_end",
        lambda file: read.append(file) or read_own_ids_end(file),
    )
    for name in ("m", "n", "m"):
        own_ids.check(tmp_path / name, ROWS)
    assert len(read) == 1
    with pytest.raises(CheckpointError, match="cannot read"):
        own_ids.check(tmp_path / "none", ROWS)
