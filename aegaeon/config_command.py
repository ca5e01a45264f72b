"""The command `aegaeon config`: what a configuration file may hold, and whether one does."""

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from aegaeon.config import Settings, load_settings
from aegaeon.flags import Parser

EXAMPLES = """\
examples:
  aegaeon config schema > settings.schema.json   # for editors that complete and check
  aegaeon config check server.toml

exit codes: 0 it is valid, 2 it is not"""

SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def config_command(given: Sequence[str]) -> Iterator[str]:
    """Yield what is to be printed. Raises ConfigError."""
    parser = Parser(
        prog="aegaeon config",
        description="Tell what a configuration file may hold.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    commands.add_parser("schema", help="print the JSON schema of the settings")
    check = commands.add_parser("check", help="read a file as `serve` would, without the models")
    check.add_argument("file", metavar="FILE", help="TOML or YAML")
    options = parser.parse_args(given)
    if options.command == "schema":
        yield json.dumps(settings_schema(), indent=2)
        return
    load_settings({}, {}, options.file)
    yield f"{options.file} is valid"


def settings_schema() -> dict[str, Any]:
    """Return the JSON schema of the settings, and so of a configuration file."""
    head = {"$schema": SCHEMA_DIALECT, "title": "aegaeon settings"}
    schema: dict[str, Any] = msgspec.json.decode(
        msgspec.json.encode({**head, **msgspec.json.schema(Settings)})
    )
    return schema
