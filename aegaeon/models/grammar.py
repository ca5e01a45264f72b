"""Grammars of llguidance: bounds on what one may take, and whether it is one."""

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from aegaeon.errors import InvalidRequest

MAX_GRAMMAR_BYTES = 64 << 10
# Much below what llguidance allows by itself: kilobytes for each state, and microseconds for each
# item of a row.
MAX_LEXER_STATES = 20_000


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
    # Much of the work is done only where there are tokens. What these lack is no fault of the
    # grammar's: what matters is that it comes to an end.
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0, limits=limits())
    if not matcher.is_error():
        matcher.compute_bitmask()


def plain(message: str) -> str:
    """Return what llguidance says without the parts that are for its own developers."""
    return " ".join(message.replace("<non-verbose/>", "").split())[:300]
