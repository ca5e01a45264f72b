"""Grammars of llguidance: bounds on what one may take, and whether it is one."""

import re
from hashlib import blake2b

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from aegaeon.errors import InvalidRequest

MAX_GRAMMAR_BYTES = 64 << 10
# Much below what llguidance allows by itself: kilobytes for each state, and microseconds for each
# item of a row.
MAX_LEXER_STATES = 20_000
# Of an answer that is tried: some troubles come only where its first braces and names are written.
TRIED_BYTES = 256
# What to write where there is a choice: some objects, and everything else as short as may be.
_SHORT = b'",:{[}]'
TRIED_OBJECTS = 4
_CROWDED_ROW = re.compile(r"Current row has (\d+) items; max is (\d+)")


def digest_of(grammar: str) -> bytes:
    """Return a short name of a grammar, the same in all processes."""
    return blake2b(grammar.encode(), digest_size=16).digest()


def limits() -> LLParserLimits:
    """Return the bounds of one grammar: milliseconds for a token, a second for building it."""
    return LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)


def check_grammar(grammar: str) -> None:
    """Raise InvalidRequest where `grammar` is none. Takes as long and as much as following it would
    at its beginning, so whoever calls this has bounds on both."""
    size_bytes = len(grammar.encode())
    if size_bytes > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(
            f"the schema takes {size_bytes} bytes, at most {MAX_GRAMMAR_BYTES} are allowed; "
            "shorten it"
        )
    is_wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar, None, limits=limits())
    if is_wrong:
        raise InvalidRequest(f"the schema cannot be followed: {plain(messages[0])}")
    # Much of the work is done only where there are tokens, and much of what is wrong shows only
    # then. The tokens are bytes: no grammar of ours names others.
    vocabulary = LLTokenizer("byte")
    matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits())
    _try_answer(matcher)
    if matcher.is_error():
        raise InvalidRequest(f"the schema cannot be followed: {plain(matcher.get_error())}")


def _try_answer(matcher: LLMatcher) -> None:
    """Write a beginning of an answer, the same for the same grammar, until it ends or fails."""
    objects, is_text = 0, False
    for _ in range(TRIED_BYTES):
        if matcher.is_error() or matcher.is_stopped():
            return
        mask = matcher.compute_bitmask()
        allowed = [byte for byte in range(256) if mask[byte // 8] >> byte % 8 & 1]
        if not allowed:
            return
        visible = (byte for byte in allowed if byte > 32)
        wanted = _SHORT if is_text or objects == TRIED_OBJECTS else b"{" + _SHORT
        byte = next((byte for byte in wanted if byte in allowed), next(visible, allowed[0]))
        matcher.consume_token(byte)
        objects += byte == b"{"[0] and not is_text
        is_text ^= byte == b'"'[0]


def plain(message: str) -> str:
    """Return what llguidance says without the parts that are for its own developers."""
    if "NoExtension" in message:
        return "nothing may come at some place of it; look for a $ref that leads back to itself"
    crowded = _CROWDED_ROW.search(message)
    if crowded is not None:
        return (
            f"too many things may come at one place of it ({crowded[1]} items, at most "
            f"{crowded[2]} are followed); have fewer optional properties, or require them"
        )
    return " ".join(message.replace("<non-verbose/>", "").split())[:300]
