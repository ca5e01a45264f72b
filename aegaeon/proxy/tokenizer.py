"""The text side of a model: tokenizer, chat template, its own sampling defaults and stop tokens."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from aegaeon.errors import CheckpointError, InvalidRequest
from aegaeon.proxy.chat import ChatTemplate, Template, read_template, token_text
from aegaeon.proxy.detokenize import (
    ByteLevelDetokenizer,
    Detokenizer,
    WindowDetokenizer,
    token_name_bytes,
)
from aegaeon.proxy.encoders import Encoder, LocalEncoder
from aegaeon.proxy.tools import dialect_of


class SamplingDefaults(msgspec.Struct, frozen=True):
    """What applies where a client says nothing: generation_config.json's values, else OpenAI's.

    As in vLLM, `do_sample` is not looked at: a client that wants greedy decoding says
    temperature 0, and one that says nothing gets OpenAI's temperature 1 or the model's own.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class TextModel:
    """Turns text into token ids and back for one model. Reads its directory once; immutable."""

    def __init__(
        self,
        directory: str,
        make_template: Callable[[str, dict[str, str]], Template] = ChatTemplate,
        encoder: Encoder | None = None,
    ) -> None:
        """`make_template` makes what renders the chat template of its source and special tokens.
        `encoder` is of the directory's tokenizer, which otherwise is read here and now.
        Raises CheckpointError when the tokenizer's files are missing or damaged."""
        root = Path(directory)
        self._encoder = encoder or LocalEncoder(root / "tokenizer.json")
        self.vocabulary = vocabulary = self._encoder.decoding.vocabulary
        tokenizer_config = _read_object(root / "tokenizer_config.json")
        generation = _read_object(root / "generation_config.json")
        self._template = read_template(root, tokenizer_config, make_template)
        self.dialect = None if self._template is None else dialect_of(self._template.source)
        self._byte_level = self._encoder.decoding.byte_level
        self.longest_token_chars = vocabulary.longest_chars
        self.defaults = _defaults(generation)
        self.stop_token_ids = self._stop_ids(
            generation, _read_object(root / "config.json"), tokenizer_config
        )

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        extras: dict[str, Any] | None = None,
    ) -> tuple[int, ...]:
        """Render and tokenise a conversation; the template writes its special tokens itself.

        Raises InvalidRequest when the model has no template or the template refuses.
        """
        text = self.render_chat(messages, tools, extras)
        return self._ids(text, add_special_tokens=False)

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        extras: dict[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the prompt's text. Raises as encode_chat."""
        if self._template is None:
            raise InvalidRequest("the model has no chat template; use /v1/completions instead")
        return self._template.render(messages, tools, extras, add_generation_prompt)

    def try_template(self) -> None:
        """Raise CheckpointError where the chat template cannot be compiled."""
        if self._template is not None:
            # What it says of this conversation is no matter.
            with contextlib.suppress(InvalidRequest):
                self._template.render([{"role": "user", "content": "hello"}], None, None, True)

    def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Tokenise a plain prompt, with the special tokens that the tokenizer adds by itself."""
        return self._ids(text, add_special_tokens)

    def decode(self, token_ids: tuple[int, ...], keep_special: bool = False) -> str:
        """Return the text of all ids at once, without special tokens unless they are kept."""
        return self.vocabulary.decode(token_ids, skip_special_tokens=not keep_special)

    def token_name(self, token_id: int) -> str:
        """Return what the vocabulary calls a token; an unknown id has no name."""
        return self.vocabulary.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for; a control sign stands for its name."""
        raw = b"" if self._byte_level is None else self._byte_level.bytes_of(token_id)
        return raw or token_name_bytes(self.vocabulary, token_id)

    def detokenizer(self) -> Detokenizer:
        """Return a fresh incremental decoder for one sequence."""
        if self._byte_level is not None:
            return ByteLevelDetokenizer(self._byte_level)
        return WindowDetokenizer(self.vocabulary)

    def _ids(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        return self._encoder.encode(text, add_special_tokens)

    def _stop_ids(self, *sources: dict[str, Any]) -> tuple[int, ...]:
        generation, model, tokenizer_config = sources
        declared = generation.get("eos_token_id", model.get("eos_token_id"))
        ids = set(declared) if isinstance(declared, list) else {declared}
        eos = token_text(tokenizer_config.get("eos_token"))
        if eos is not None:
            ids.add(self.vocabulary.token_to_id(eos))
        return tuple(sorted(token_id for token_id in ids if isinstance(token_id, int)))


def _read_object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError, RecursionError) as error:
        raise CheckpointError(
            f"cannot read {file}: {error}; fetch or import the model again"
        ) from None


def _defaults(generation: dict[str, Any]) -> SamplingDefaults:
    names = SamplingDefaults.__struct_fields__
    given = {name: generation[name] for name in names if generation.get(name) is not None}
    try:
        return msgspec.convert(given, SamplingDefaults)
    except msgspec.ValidationError as error:
        raise CheckpointError(
            f"generation_config.json is wrong: {error}; correct or remove the field"
        ) from None
