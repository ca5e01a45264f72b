"""What a body holds is bounded before anyone works with it; bodies.py reads it."""

from collections.abc import Sequence
from typing import Any

from aegaeon.proxy.failures import invalid

MAX_MESSAGES = 4096
MAX_PARTS = 4096  # of all messages together
MAX_CALLS = 4096  # likewise
MAX_STOPS = 4
MAX_STOP_CHARS = 1024
MAX_BIASES = 1024
MAX_TREE_DEPTH = 64
MAX_TREE_NODES = 20_000
MAX_TREE_CHARS = 1 << 20
MAX_ALL_OF = 64  # schemas of one that all have to hold
MAX_MET_PATTERNS = 8  # of those: what meets all of them may take as much as their product


def check_count(param: str, count: int, most: int, what: str) -> None:
    """Raise ApiError when `param` has more than `most` of something."""
    if count > most:
        raise invalid(param, f"'{param}' has {count} {what}; at most {most} are allowed")


def check_stops(stops: Sequence[str]) -> None:
    """Raise ApiError for stop strings that are too many, too long, or none."""
    check_count("stop", len(stops), MAX_STOPS, "strings")
    if any(not stop for stop in stops):
        raise invalid("stop", "'stop' contains an empty string")
    check_count("stop", max(map(len, stops), default=0), MAX_STOP_CHARS, "characters in a string")


def check_tree(param: str, value: Any) -> None:
    """Raise ApiError for JSON that is too deep or too large to be worked with: tools and schemas
    become grammars, which grow with both, and other objects are looked through by templates."""
    level, depth, nodes, chars = [value], 0, 0, 0
    while level:
        depth += 1
        nodes += len(level)
        check_count(param, depth, MAX_TREE_DEPTH, "levels")
        check_count(param, nodes, MAX_TREE_NODES, "values")
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                below.extend(one.values())
                chars += sum(map(len, one))
            elif isinstance(one, list):
                below.extend(one)
            elif isinstance(one, str):
                chars += len(one)
        check_count(param, chars, MAX_TREE_CHARS, "characters")
        level = below


def check_schemas(param: str, value: Any) -> None:
    """Raise ApiError where schemas in `value`, which is not too deep, must be met together and are
    many. What they take is bounded elsewhere; this says what is wrong, at once."""
    if isinstance(value, dict):
        met = value.get("allOf")
        if isinstance(met, list):
            check_count(param, len(met), MAX_ALL_OF, "schemas in one 'allOf'")
            patterns = sum(isinstance(one, dict) and "pattern" in one for one in met)
            check_count(param, patterns, MAX_MET_PATTERNS, "patterns in one 'allOf'")
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            check_schemas(param, one)
