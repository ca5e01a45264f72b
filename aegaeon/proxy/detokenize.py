"""Token ids become text bit by bit: whole characters only, and never a part of a stop string.

The pieces joined are the decode of all ids at once.
"""

import codecs
from abc import ABC, abstractmethod
from functools import partial

from aegaeon import _native
from aegaeon.proxy.vocabulary import Vocabulary

_REPLACEMENT = "\ufffd"
# A decoder that holds back this many tokens is being fed noise; its text goes out as it is.
_MAX_HELD_TOKENS = 256


class Detokenizer(ABC):
    """The text of one sequence, as it grows. Special tokens have none."""

    # The bytes of its tokens, where these and the beginning of a character are all there is to it.
    vocabulary: _native.TokenVocabulary | None = None

    @abstractmethod
    def push(self, token_id: int) -> str:
        """Take one token and return the text that is certain now."""

    @abstractmethod
    def finish(self) -> str:
        """Return what was held back; a torn character becomes U+FFFD."""

    @property
    def torn(self) -> bytes:
        """The beginning of a character that is held back, where it has a `vocabulary`."""
        raise NotImplementedError

    def resume(self, torn: bytes) -> None:
        """Go on behind tokens that somebody else has made text of, but for `torn`."""
        raise NotImplementedError


class ByteLevelVocabulary:
    """The bytes of a byte-level vocabulary's tokens, each worked out when it first comes."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._alphabet = _byte_alphabet()
        self._bytes = dict.fromkeys(vocabulary.special, b"")
        # The text of tokens of whole characters, and None for the others; as they come.
        self._texts: dict[int, str | None] = {}
        # Not of `bytes_of`: native code would keep this alive, which keeps it.
        special = frozenset(self._bytes)
        self.native = _native.TokenVocabulary(
            partial(_bytes_of, vocabulary, self._alphabet, special)
        )

    def bytes_of(self, token_id: int) -> bytes:
        """Return the token's bytes; special and unknown ids have none."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = _bytes_of(
                self._vocabulary, self._alphabet, frozenset(), token_id
            )
        return known

    def text_of(self, token_id: int) -> str | None:
        """Return the token's text, or None where it begins or ends within a character."""
        try:
            return self._texts[token_id]
        except KeyError:
            pass
        try:
            text = self.bytes_of(token_id).decode()
        except UnicodeDecodeError:
            text = None
        self._texts[token_id] = text
        return text


class ByteLevelDetokenizer(Detokenizer):
    """For byte-level vocabularies (GPT-2's scheme: Llama 3, Qwen, SmolLM): constant work a token.

    Not for decoders that look at neighbouring tokens.
    """

    def __init__(self, vocabulary: ByteLevelVocabulary) -> None:
        self._vocabulary = vocabulary
        self.vocabulary = vocabulary.native
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_torn = False  # part of a character is held back

    def push(self, token_id: int) -> str:
        if not self._is_torn and (text := self._vocabulary.text_of(token_id)) is not None:
            return text
        text = self._decoder.decode(self._vocabulary.bytes_of(token_id))
        self._is_torn = bool(self._decoder.getstate()[0])
        return text

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)

    @property
    def torn(self) -> bytes:
        return self._decoder.getstate()[0]

    def resume(self, torn: bytes) -> None:
        self._decoder.setstate((torn, 0))
        self._is_torn = bool(torn)


class WindowDetokenizer(Detokenizer):
    """For any other decoder: decodes a short window again and hands out what is new in it.

    Text is held while it ends in a torn character or in byte tokens, whose reading the next token
    may still change.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._window: list[int] = []
        # Tokens of the window that only give context, and their text.
        self._known = 0
        self._known_text = ""

    def push(self, token_id: int) -> str:
        token = self._vocabulary.id_to_token(token_id)
        if token is None or token_id in self._vocabulary.special:
            return ""
        self._window.append(token_id)
        text = self._vocabulary.decode(self._window)
        is_torn = text.endswith(_REPLACEMENT) or _is_byte_token(token)
        if is_torn and len(self._window) - self._known < _MAX_HELD_TOKENS:
            return ""
        new = text[len(self._known_text) :]
        self._window = self._window[self._known :]
        self._known = len(self._window)
        self._known_text = self._vocabulary.decode(self._window)
        return new

    def finish(self) -> str:
        text = self._vocabulary.decode(self._window)
        new = text[len(self._known_text) :]
        self._known_text = text
        return new


class StopMatcher:
    """Cuts text before the first stop string, holding back what may become one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take new text; return what may go out, and whether a stop string was met."""
        if not self._stops:
            return text, False
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        cut = len(text) - self._open_prefix(text)
        self._held = text[cut:]
        return text[:cut], False

    def finish(self) -> str:
        """Return what was held back: no stop string came of it."""
        held, self._held = self._held, ""
        return held

    def _open_prefix(self, text: str) -> int:
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest


def token_name_bytes(vocabulary: Vocabulary, token_id: int) -> bytes:
    """Return the bytes of a token by its name in the vocabulary, for those that SentencePiece made
    and for control signs; none for unknown ids."""
    name = vocabulary.id_to_token(token_id)
    if name is None:
        return b""
    if _is_byte_token(name):
        return bytes([int(name[3:5], 16)])
    return name.replace("\u2581", " ").encode()


def _is_byte_token(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _bytes_of(
    vocabulary: Vocabulary, alphabet: dict[str, int], special: frozenset[int], token_id: int
) -> bytes:
    text = None if token_id in special else vocabulary.id_to_token(token_id)
    return b"" if text is None else _token_bytes(text, alphabet)


def _token_bytes(text: str, alphabet: dict[str, int]) -> bytes:
    # A token with a character outside the alphabet (an added one) stands for its own text.
    if all(character in alphabet for character in text):
        return bytes(alphabet[character] for character in text)
    return text.encode()


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's letters for the 256 bytes: printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    rest = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(rest)})
    return alphabet
