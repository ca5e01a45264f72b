"""The tokenizer in a GGUF file -> tokenizer.json and tokenizer_config.json.

Only byte-level BPE ("gpt2") with a pre-tokenizer whose rules are known to the letter.
"""

import logging
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from aegaeon.errors import CheckpointError, UnsupportedModel
from aegaeon.models.gguf_metadata import GgufMetadata

log = logging.getLogger(__name__)

# llama.cpp's token types.
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What each name in tokenizer.ggml.pre splits text by; None: GPT-2's own rule.
SPLITS: dict[str, str | None] = {
    "gpt-2": None,
    "default": None,
    "smollm": None,
    "qwen2": _WORDS % r"\p{N}",
    "llama-bpe": _WORDS % r"\p{N}{1,3}",
}


def build_tokenizer(metadata: GgufMetadata) -> Tokenizer:
    """Return the file's tokenizer. Raises UnsupportedModel, CheckpointError."""
    kind = metadata.text("tokenizer.ggml.model")
    name = metadata.get("tokenizer.ggml.pre") or "default"
    if kind != "gpt2" or name not in SPLITS:
        raise UnsupportedModel(
            f"{metadata.source}: tokenizer {kind!r} with pre-tokenizer {name!r} is not built; "
            f"built is 'gpt2' with {', '.join(SPLITS)}; take the model's safetensors"
        )
    if name == "default":
        log.warning("no pre-tokenizer named, taking that of GPT-2 file=%s", metadata.source)
    tokens = metadata.texts("tokenizer.ggml.tokens")
    kinds = metadata.integers("tokenizer.ggml.token_type")
    if len(kinds) != len(tokens):
        raise CheckpointError(
            f"{metadata.source}: {len(tokens)} tokens have {len(kinds)} types; "
            "download the file again"
        )
    vocab = {token: i for i, token in enumerate(tokens) if kinds[i] != UNUSED}
    model = models.BPE(
        vocab=vocab,
        merges=_merges(metadata, vocab),
        ignore_merges=name == "llama-bpe",
    )
    tokenizer = Tokenizer(model)
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(name)
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, tokens, kinds, metadata.source)
    tokenizer.post_processor = _post_processor(metadata, tokens)
    return tokenizer


def adds_bos(metadata: GgufMetadata) -> bool:
    """Whether every text begins with the BOS token: as said, else llama.cpp's default."""
    said = metadata.get("tokenizer.ggml.add_bos_token")
    if said is None:
        said = metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    return bool(said) and metadata.token_id("bos") is not None


def tokenizer_config_json(metadata: GgufMetadata) -> dict[str, Any]:
    """Return tokenizer_config.json, with the chat template if the file has one."""
    tokens = metadata.texts("tokenizer.ggml.tokens")

    def token(name: str) -> str | None:
        index = metadata.token_id(name)
        return None if index is None else tokens[index]

    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata.integer("context_length"),
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "pad_token": token("padding"),
        "add_bos_token": adds_bos(metadata),
        "clean_up_tokenization_spaces": False,
    }
    template = metadata.get("tokenizer.chat_template")
    return config | {"chat_template": template} if isinstance(template, str) else config


def _merges(metadata: GgufMetadata, vocab: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for line in metadata.texts("tokenizer.ggml.merges"):
        left, _, right = line.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise CheckpointError(
                f"{metadata.source}: the merge {line[:80]!r} names unknown tokens; "
                "download the file again"
            )
        merges.append((left, right))
    return merges


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    split = SPLITS[name]
    if split is not None:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    by_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_gpt2])
    return by_gpt2


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], kinds: list[int], source: str) -> None:
    for kind in (CONTROL, USER_DEFINED):
        added = [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, its_kind in zip(tokens, kinds, strict=True)
            if its_kind == kind and token
        ]
        (tokenizer.add_special_tokens if kind == CONTROL else tokenizer.add_tokens)(added)
    for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind != UNUSED and tokenizer.token_to_id(token) != index:
            raise CheckpointError(
                f"{source}: token {token[:80]!r} occurs twice; download the file again"
            )


def _post_processor(metadata: GgufMetadata, tokens: list[str]) -> processors.PostProcessor:
    by_bytes = processors.ByteLevel(trim_offsets=False)
    bos = metadata.token_id("bos")
    if bos is None or not adds_bos(metadata):
        return by_bytes
    template = processors.TemplateProcessing(
        single=[tokens[bos], "$A"],
        pair=[tokens[bos], "$A", f"{tokens[bos]}:1", "$B:1"],
        special_tokens=[(tokens[bos], bos)],
    )
    return processors.Sequence([by_bytes, template])
