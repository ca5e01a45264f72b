"""Settings as people write them: in flags, variables and documentation."""

from types import UnionType
from typing import Any, Literal, get_origin

from aegaeon.errors import ConfigError


def parse_text(kind: Any, text: str, source: str) -> Any:
    """Parse `text` of a flag or variable `source` as `kind`: str, number, bool, tuple of str."""
    if get_origin(kind) is tuple:
        return [part.strip() for part in text.split(",") if part.strip()]
    if get_origin(kind) in (Literal, UnionType) or kind is str:
        return text
    if kind is bool:
        lowered = text.strip().lower()
        if lowered in {"1", "true", "yes", "on"}:
            return True
        if lowered in {"0", "false", "no", "off"}:
            return False
        raise ConfigError(f"{source} must be true or false, not {text!r}")
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{source} must be of type {kind.__name__}, not {text!r}") from None


def default_text(default: Any) -> str:
    """Return a setting's default as people write it."""
    match default:
        case bool():
            return "yes" if default else "no"
        case tuple():
            return ",".join(map(str, default))
        case float():
            return f"{default:g}"
        case _:
            return str(default)
