"""The table of clients by features, as Markdown."""

from collections.abc import Sequence

import msgspec

HEAD = """# Conformance

What works with which client, tried against a running server by `make conformance`; do not edit.
The models are SmolLM2-135M-Instruct, and, for tools, a random one with the tokenizer and template
of Qwen3. An empty cell: the client has no such thing, or is not asked for it here.
"""


class Line(msgspec.Struct, frozen=True):
    """What a client's script says of one feature."""

    feature: str
    ok: bool
    note: str = ""
    took_s: float = 0.0


class Tried(msgspec.Struct, frozen=True):
    """A client, its version, and what came of it; `missing` says why it could not be tried."""

    client: str
    version: str
    lines: tuple[Line, ...] = ()
    missing: str = ""


def to_markdown(tried: Sequence[Tried]) -> str:
    """Return the page."""
    features = list(dict.fromkeys(line.feature for one in tried for line in one.lines))
    names = [f"{one.client} {one.version}".strip() for one in tried]
    rows = [HEAD, _row(["", *names]), _row(["---", *[":---:"] * len(names)])]
    told = [{line.feature: line for line in one.lines} for one in tried]
    rows += [_row([name, *(_cell(lines.get(name)) for lines in told)]) for name in features]
    failed = [
        f"- {one.client}, {line.feature}: {line.note}"
        for one in tried
        for line in one.lines
        if not line.ok
    ]
    failed += [f"- {one.client} was not tried: {one.missing}" for one in tried if one.missing]
    if failed:
        rows += ["", "What does not work:", "", *failed]
    return "\n".join(rows) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(line: Line | None) -> str:
    if line is None:
        return ""
    return "yes" if line.ok else "**no**"
