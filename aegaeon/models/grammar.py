"""Grammars of llguidance: bounds on what one may take, and whether it is one."""

from llguidance import LLMatcher, LLParserLimits

from aegaeon.errors import InvalidRequest

MAX_GRAMMAR_BYTES = 64 << 10
# Much below what llguidance allows by itself: kilobytes for each state, and microseconds for each
# item of a row.
MAX_LEXER_STATES = 20_000


def limits() -> LLParserLimits:
    """Return the bounds of one grammar: milliseconds for a token, a second for building it."""
    return LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)


def check_grammar(grammar: str) -> None:
    """Raise InvalidRequest where `grammar` is none, or takes too much. Releases the GIL."""
    size_bytes = len(grammar.encode())
    if size_bytes > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(
            f"the schema takes {size_bytes} bytes, at most {MAX_GRAMMAR_BYTES} are allowed; "
            "shorten it"
        )
    is_wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar, None, limits=limits())
    if is_wrong:
        raise InvalidRequest(f"the schema cannot be followed: {plain(messages[0])}")


def plain(message: str) -> str:
    """Return what llguidance says without the parts that are for its own developers."""
    return " ".join(message.replace("<non-verbose/>", "").split())[:300]
