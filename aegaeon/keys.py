"""The command `aegaeon keys`: makes, lists and revokes the keys of a keys file."""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from rich.table import Table

from aegaeon.config import load_settings
from aegaeon.errors import ConfigError
from aegaeon.flags import Parser
from aegaeon.proxy.keys import SCOPES, checked_key, create_key, read_keys, revoke_key

EXAMPLES = """\
examples:
  aegaeon keys create alice --keys-file keys.json
  aegaeon keys create ops --scopes admin,metrics --keys-file keys.json
  aegaeon keys create batch --models small,large --weight 0.5 --keys-file keys.json
  aegaeon keys revoke alice --keys-file keys.json
  aegaeon serve --models small,large --keys-file keys.json

`create` prints the key, once; the file has only its hash. A running server reads the file anew
when it changes. Clients send a key as OPENAI_API_KEY, or `Authorization: Bearer KEY`.
exit codes: 0 done, 1 no such key, 2 wrong usage or file"""


def keys_command(given: Sequence[str]) -> Iterator[Table | str]:
    """Do as told and yield what is to be printed. Raises ConfigError, InvalidRequest."""
    options = _parser().parse_args(given)
    flags = {"keys_file": options.keys_file} if "keys_file" in options else {}
    named = load_settings(flags, config_file=options.config).keys_file
    if not named:
        raise ConfigError("no keys file is named; give --keys-file FILE")
    path = Path(named).expanduser()
    match options.command:
        case "create":
            yield create_key(path, checked_key(_given(options)))
        case "revoke":
            revoke_key(path, options.name)
            yield f"revoked {options.name}"
        case "list":
            keys = read_keys(path)
            if options.json:
                shown = [msgspec.to_builtins(key) for key in keys]
                yield json.dumps({"keys": [{**key, "sha256": key["sha256"][:8]} for key in shown]})
                return
            table = Table("name", "scopes", "models", "weight", "created", box=None)
            for key in keys:
                models = ", ".join(key.models) or "all"
                table.add_row(
                    key.name, ", ".join(key.scopes), models, f"{key.weight:g}", key.created
                )
            yield table


def _given(options: argparse.Namespace) -> dict[str, object]:
    return {
        "name": options.name,
        "scopes": _parts(options.scopes),
        "models": _parts(options.models),
        "weight": options.weight,
    }


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _parser() -> Parser:
    parser = Parser(
        prog="aegaeon keys",
        description="Look after the keys with which clients are let in.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shared = Parser(add_help=False)
    shared.add_argument(
        "--keys-file", metavar="FILE", help="the file of keys", default=argparse.SUPPRESS
    )
    shared.add_argument("--config", metavar="FILE", help="settings that name it", default=None)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    create = commands.add_parser("create", parents=[shared], help="make a key and print it")
    create.add_argument("name", metavar="NAME", help="whose it is")
    create.add_argument(
        "--scopes",
        metavar="A,B",
        default="inference",
        help=f"what it is good for, of {', '.join(SCOPES)} (default: inference)",
    )
    create.add_argument(
        "--models", metavar="A,B", default="", help="models it may use (default: all)"
    )
    create.add_argument(
        "--weight",
        metavar="X",
        type=float,
        default=1.0,
        help="its share among keys that wait (default: 1)",
    )
    listing = commands.add_parser("list", parents=[shared], help="show the keys, not their secrets")
    listing.add_argument("--json", action="store_true", help="as JSON, for programs")
    revoke = commands.add_parser("revoke", parents=[shared], help="let a key in no more")
    revoke.add_argument("name", metavar="NAME", help="the key's name")
    return parser
