"""Whether a tokenizer fits a model's weights, without the tokenizer's library.

Rows of the embedding beyond the last token are padding. The other way round there are no weights
for a token: of the vocabulary's own none may be so, for any text may hold it. An added one may (a
padding token that came with training); a prompt that has it is refused when it comes.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from aegaeon.errors import CheckpointError


class _Model(msgspec.Struct, frozen=True):
    vocab: dict[str, int] | list[Any] = {}


class _Tokenizer(msgspec.Struct, frozen=True):
    model: _Model = _Model()


def own_ids_end(ids: Iterable[int]) -> int:
    """Return the number behind the largest of `ids`; 0 where there are none."""
    return max(ids, default=-1) + 1


def read_own_ids_end(file: Path) -> int:
    """Return the number behind the last token of a tokenizer.json's own vocabulary; 0 where the
    file says nothing of it: whoever tokenises reads it whole. Raises CheckpointError."""
    try:
        vocab = msgspec.json.decode(file.read_bytes(), type=_Tokenizer).model.vocab
    except msgspec.MsgspecError:
        return 0
    except OSError as error:
        raise CheckpointError(
            f"cannot read {file} ({error.strerror}); fetch or import the model again"
        ) from None
    # Unigram's are a list of pieces and scores.
    return own_ids_end(vocab.values()) if isinstance(vocab, dict) else len(vocab)


def check_own_ids(own_end: int, vocab_tokens: int, directory: str | Path) -> None:
    """Raise CheckpointError where tokens have no row of an embedding of `vocab_tokens`."""
    if own_end > vocab_tokens:
        raise CheckpointError(
            f"the tokenizer in {directory} has ids up to {own_end - 1}, its weights only "
            f"{vocab_tokens} rows of an embedding: they are of different models; fetch or import "
            "the model again"
        )


class OwnIds:
    """What `read_own_ids_end` says of files, each content of which is read once."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int, int, int], int] = {}

    def check(self, directory: Path, vocab_tokens: int) -> None:
        """Raise CheckpointError where the tokenizer in `directory` has tokens without weights."""
        file = directory / "tokenizer.json"
        try:
            found = file.stat()
        except OSError as error:
            raise CheckpointError(
                f"cannot read {file} ({error.strerror}); fetch or import the model again"
            ) from None
        key = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
        own_end = self._known.get(key)
        if own_end is None:
            own_end = self._known[key] = read_own_ids_end(file)
        check_own_ids(own_end, vocab_tokens, directory)
