"""What a tokenizer knows of its tokens, as data: enough to make text of ids without it.

A tokenizer takes a second to be read and over a hundred megabytes; this takes a copy of its names.
"""

import json
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer, decoders

from aegaeon.errors import CheckpointError
from aegaeon.models.token_ids import own_ids_end

_EMPTY: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "BPE", "vocab": {}, "merges": []},
}


class Tokens(msgspec.Struct, frozen=True):
    """The names of a vocabulary's tokens, those of ids 0, 1, ... joined; the n-th ends at the n-th
    of `ends` (32 bits each, of this machine). `gaps` are ids without a token, `special` those that
    are control signs, `own_end` is behind the last of the model's own, so that all others were
    added. `decoder` is that part of tokenizer.json."""

    names: bytes
    ends: bytes
    gaps: tuple[int, ...]
    special: tuple[int, ...]
    own_end: int
    longest_chars: int
    decoder: bytes


class Vocabulary:
    """Tokens and what joins them to text, as the tokenizer would. Immutable."""

    def __init__(self, tokens: Tokens) -> None:
        """Raises CheckpointError where nothing is known by the name of its decoder."""
        self._names = tokens.names
        self._ends = array("I", tokens.ends)
        self._gaps = frozenset(tokens.gaps)
        self.special = frozenset(tokens.special)
        self.own_end = tokens.own_end
        self.longest_chars = tokens.longest_chars
        self._decoder, self.is_byte_level = _decoder_of(tokens.decoder)

    def __len__(self) -> int:
        """Behind the last id."""
        return len(self._ends)

    @cached_property
    def held_bytes(self) -> int:
        """What it takes, about."""
        return len(self._names) + 4 * len(self._ends)

    def id_to_token(self, token_id: int) -> str | None:
        """Return the token's name, or None where there is none."""
        if not 0 <= token_id < len(self._ends) or token_id in self._gaps:
            return None
        begin = self._ends[token_id - 1] if token_id else 0
        return self._names[begin : self._ends[token_id]].decode()

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a name, or None. Looks through all of them."""
        name, at = token.encode(), -1
        while (at := self._names.find(name, at + 1)) >= 0:
            token_id = bisect_left(self._ends, at + len(name))
            if self.id_to_token(token_id) == token:
                return token_id
        return None

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of all ids at once."""
        hidden = self.special if skip_special_tokens else frozenset[int]()
        names = [self.id_to_token(one) for one in token_ids if one not in hidden]
        known = [name for name in names if name is not None]
        if self._decoder is None:
            return " ".join(known)
        return str(self._decoder.decode(known))


def read_tokenizer(file: Path) -> Tokenizer:
    """Read tokenizer.json. Takes a second, and holds the interpreter's lock all the while. Raises
    CheckpointError."""
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises the bare class, whatever is wrong
        raise CheckpointError(
            f"cannot read {file}: {error}; fetch or import the model again"
        ) from None
    if not tokenizer.get_vocab_size():
        raise CheckpointError(f"{file} has no tokens; fetch or import the model again")
    # Padding and truncation saved with the tokenizer are for training.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


class _DecoderPart(msgspec.Struct, frozen=True):
    decoder: msgspec.Raw = msgspec.Raw(b"null")


def tokens_of(tokenizer: Tokenizer, decoder: bytes) -> Tokens:
    """Return the tokens of `tokenizer`, whose part `decoder` is."""
    added = tokenizer.get_added_tokens_decoder()
    own_end = own_ids_end(tokenizer.get_vocab(with_added_tokens=False).values())
    names, ends, gaps = bytearray(), array("I"), []
    longest = 0
    for token_id in range(max(own_end, own_ids_end(added))):
        name = tokenizer.id_to_token(token_id)
        if name is None:
            gaps.append(token_id)
        else:
            names += name.encode()
            longest = max(longest, len(name))
        ends.append(len(names))
    special = tuple(token_id for token_id, token in added.items() if token.special)
    table = bytes(names), ends.tobytes(), tuple(gaps)
    return Tokens(*table, special, own_end, longest, decoder)


def decoder_part(file: Path) -> bytes:
    """Return the decoder in a tokenizer.json that was read before, which may have megabytes."""
    return bytes(msgspec.json.decode(file.read_bytes(), type=_DecoderPart).decoder)


def _decoder_of(part: bytes) -> tuple[decoders.Decoder | None, bool]:
    """Return what joins tokens, and whether that is the scheme of byte-level vocabularies alone."""
    described = msgspec.json.decode(part) if part else None
    if described is None:
        return None, False
    try:
        tokenizer = Tokenizer.from_str(json.dumps({**_EMPTY, "decoder": described}))
    except Exception as error:  # as above
        raise CheckpointError(f"the decoder of tokenizer.json is wrong: {error}") from None
    steps = [described]
    if described.get("type") == "Sequence":
        steps = described.get("decoders", [])
    is_byte_level = len(steps) == 1 and steps[0].get("type") == "ByteLevel"
    return tokenizer.decoder, is_byte_level
