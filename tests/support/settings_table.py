"""The README's table of settings, made from their definitions; run it to renew the README."""

import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec

from aegaeon.config import Settings, describe
from aegaeon.setting_text import default_text

README = Path(__file__).resolve().parents[2] / "README.md"
MARKS = re.compile(r"(<!-- settings:[^\n]*-->\n).*?(<!-- end of settings -->)", re.DOTALL)


def settings_table() -> str:
    """Return the table as Markdown."""
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for field in msgspec.structs.fields(Settings):
        kind, text, default = describe(field.name)
        flag = "--" + field.name.replace("_", "-")
        if get_origin(kind) is Literal:
            text = f"{text}: {', '.join(get_args(kind))}"
        rows.append(f"| `{flag}` | {_shown(default)} | {text} |")
    return "\n".join(rows) + "\n"


def _shown(default: Any) -> str:
    text = default_text(default)
    return f"`{text}`" if text and not isinstance(default, bool) else text


def with_table(text: str) -> str:
    """Return the README's `text` with the present table."""
    return MARKS.sub(lambda match: match[1] + settings_table() + match[2], text)


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
