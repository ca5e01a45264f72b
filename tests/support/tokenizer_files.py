"""Tokenizers of several sizes and kinds as files, made here."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers


def byte_level(tokens: int = 300) -> Tokenizer:
    """A vocabulary of bytes and invented pairs, with added tokens behind a gap."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate(alphabet)}
    merges = []
    pairs = ((one, other) for one in tuple(vocab) for other in tuple(vocab))
    for one, other in pairs:
        if len(vocab) >= tokens:
            break
        merges.append((one, other))
        vocab[one + other] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken("ä b", special=False)])
    return tokenizer


def metaspace() -> Tokenizer:
    """In the manner of SentencePiece."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁the", "▁c", "a", "t", "▁dog", "s", "é", "!"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return tokenizer


def words() -> Tokenizer:
    """Whole words, and nothing that joins them; ids with gaps."""
    vocab = {"hello": 0, "world": 3, "again": 7}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="hello"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


KINDS = {"byte_level": byte_level, "metaspace": metaspace, "words": words}


def write(directory: Path, tokenizer: Tokenizer) -> Path:
    """Write the text side of a model that has this tokenizer; return its directory."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    return directory
