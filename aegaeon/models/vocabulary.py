"""A model's vocabulary as grammars see it: which bytes each token adds to the text of an answer.

llguidance by itself takes an added token whose name stands in angle brackets for a control sign,
as Qwen's `<tool_call>`, and still forces it where its name is the only text that may come. Here a
token is text wherever a detokenizer shows it.
"""

from pathlib import Path
from typing import Any

import msgspec
from llguidance import LLTokenizer


class _Vocabulary:
    """What LLTokenizer takes for a tokenizer that it does not know; it wants these names."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, plain: LLTokenizer, control_ids: frozenset[int]) -> None:
        """`plain` knows the tokens' names and how text is split."""
        self.eos_token_id = plain.eos_token
        self.special_token_ids = sorted(control_ids)
        self.tokens = [plain.decode_bytes([token_id]) for token_id in range(plain.vocab_size)]
        self._plain = plain
        self._control_ids = control_ids

    def __call__(self, text: str) -> list[int]:
        """Return the tokens that a model writes `text` with, all of them text."""
        ids = self._plain.tokenize_str(text)
        is_exact = b"".join(self.tokens[token_id] for token_id in ids) == text.encode()
        if is_exact and self._control_ids.isdisjoint(ids):
            return ids
        # A schema has the name of a control sign in it, or the tokenizer changes what it reads.
        return self._plain.greedy_tokenize(text)


def read_vocabulary(
    directory: str, vocab_tokens: int, stop_token_ids: tuple[int, ...]
) -> LLTokenizer:
    """Return the vocabulary of the checkpoint in `directory`, `vocab_tokens` wide as its logits
    are. Neither control signs are text, nor stop tokens, nor ids without a token.

    Takes two seconds.

    Raises OSError, msgspec.DecodeError, or what llguidance does for a file that it cannot read.
    """
    tokenizer = msgspec.json.decode((Path(directory) / "tokenizer.json").read_bytes())
    added = tokenizer.get("added_tokens") or []
    for one in added:
        # Blanks beside a token that it takes with it are for prompts.
        one["lstrip"] = one["rstrip"] = False
    ends = list(stop_token_ids) or None
    plain = LLTokenizer(
        msgspec.json.encode(tokenizer).decode(), n_vocab=vocab_tokens, eos_token=ends, slices=[]
    )
    control = {one["id"] for one in added if one.get("special")} | set(stop_token_ids)
    known = _model_ids(tokenizer["model"]) | {one["id"] for one in added}
    control |= set(range(vocab_tokens)) - known
    vocabulary: Any = _Vocabulary(plain, frozenset(control))
    return LLTokenizer(vocabulary, n_vocab=vocab_tokens, eos_token=ends)


def _model_ids(model: dict[str, Any]) -> set[int]:
    """Return the ids that a tokenizer's model has, added tokens not counted."""
    vocab = model["vocab"]
    # Unigram's are a list of pieces and scores.
    return set(vocab.values()) if isinstance(vocab, dict) else set(range(len(vocab)))
