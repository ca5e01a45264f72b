"""The command `aegaeon models`: what is in the models directory, what brings more there, and which
of it a running server serves."""

import argparse
import json
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table
from tqdm import tqdm

from aegaeon.client import URL, Client, quoted
from aegaeon.config import api_key, load_settings
from aegaeon.flags import Parser
from aegaeon.models.references import ModelEntry, list_models
from aegaeon.sharing_command import add_sharing, fetch_model, share_models
from aegaeon.specs import PRIORITIES

CHANGES = ("add", "remove", "load", "pin", "unpin")  # of a running server


def models_command(given: Sequence[str]) -> Iterator[Table | str]:
    """Do as told and yield what is to be printed. Raises ConfigError, and what a command raises."""
    options = _parser().parse_args(given)
    if options.command in CHANGES:
        yield _change(options)
        return
    flags = {"models_dir": options.models_dir} if "models_dir" in options else {}
    models_dir = Path(load_settings(flags).models_dir).expanduser()
    match options.command:
        case "list":
            yield from _list(list_models(models_dir), models_dir, options.json)
        case "import":
            file = Path(options.file).expanduser()
            out_dir = models_dir / (options.name or file.stem).replace("/", "__")
            yield str(_import(file, out_dir, options.dtype))
        case "pull":
            # Imported here because the hub's library takes longer than all else.
            from aegaeon.models.hub import pull  # noqa: PLC0415

            yield str(pull(options.id, models_dir))
        case "share":
            yield from share_models(options, models_dir)
        case "fetch":
            yield fetch_model(options, models_dir)


def _parser() -> Parser:
    parser = Parser(prog="aegaeon models", description="Look after the models directory.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    shared = Parser(add_help=False)
    for one in (shared, parser):
        one.add_argument(
            "--models-dir", metavar="DIR", help="where models live", default=argparse.SUPPRESS
        )
    listing = commands.add_parser("list", parents=[shared], help="show what is there")
    listing.add_argument("--json", action="store_true", help="as JSON, for programs")
    importing = commands.add_parser("import", parents=[shared], help="turn a GGUF into a model")
    importing.add_argument("file", metavar="FILE.gguf", help="the file to read")
    importing.add_argument("--name", help="the model's name (default: the file's)")
    importing.add_argument(
        "--dtype",
        default="bf16",
        choices=("f32", "f16", "bf16"),
        help="of the weights on disk (default: bf16)",
    )
    pulling = commands.add_parser("pull", parents=[shared], help="download a model")
    pulling.add_argument("id", help="its hub id, like Qwen/Qwen3-0.6B")
    add_sharing(commands, shared)
    _add_changes(commands)
    return parser


def _add_changes(commands: "argparse._SubParsersAction[Parser]") -> None:
    """The commands that change a running server."""
    asking = Parser(add_help=False)
    asking.add_argument("--url", default=URL, help=f"of the server (default: {URL})")
    asking.add_argument("--key", help="with the scope admin (default: AEGAEON_API_KEY)")
    adding = commands.add_parser("add", parents=[asking], help="have a running server serve one")
    adding.add_argument("reference", metavar="NAME", help="its name in the server's --models-dir")
    adding.add_argument("--id", help="what clients ask for (default: its name)")
    adding.add_argument("--aliases", metavar="A,B", default="", help="other names for it")
    adding.add_argument("--slo-ttft-s", metavar="X", type=float, help="its own time to a token")
    adding.add_argument("--slo-tbt-s", metavar="X", type=float, help="its own time between tokens")
    adding.add_argument(
        "--priority", choices=PRIORITIES, help="who comes first where not all can be done"
    )
    adding.add_argument(
        "--idle-s", metavar="X", type=float, help="not asked for so long, it makes room for others"
    )
    adding.add_argument("--pinned", action="store_true", help="load it, and let it stay loaded")
    for name, text in (
        ("remove", "serve one no more, once its requests have ended"),
        ("load", "have one loaded where it fits"),
        ("pin", "load one, and let it stay loaded"),
        ("unpin", "let one make room for others again"),
    ):
        changing = commands.add_parser(name, parents=[asking], help=text)
        changing.add_argument("model", metavar="ID", help="the model's id or alias")


def _change(options: argparse.Namespace) -> str:
    client = Client(options.url, options.key or api_key())
    if options.command == "add":
        body: dict[str, Any] = {"reference": options.reference, "pinned": options.pinned}
        body["aliases"] = [part.strip() for part in options.aliases.split(",") if part.strip()]
        names = ("id", "slo_ttft_s", "slo_tbt_s", "priority", "idle_s")
        given = {name: getattr(options, name) for name in names}
        body |= {name: value for name, value in given.items() if value is not None}
        answer = client.call("POST", "/admin/models", body)
    elif options.command == "remove":
        answer = client.call("DELETE", f"/admin/models/{quoted(options.model)}")
    else:
        answer = client.call("POST", f"/admin/models/{quoted(options.model)}/{options.command}")
    return f"{answer['id']}: {answer['status']}"


def _import(file: Path, out_dir: Path, dtype: str) -> Path:
    """Import with a bar on stderr."""
    # Imported here: reading GGUF needs torch, which takes seconds to import.
    import_gguf = import_module("aegaeon.models.gguf").import_gguf
    with tqdm(desc=out_dir.name, unit="B", unit_scale=True, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return Path(import_gguf(file, out_dir, dtype, show))


def _list(entries: Sequence[ModelEntry], models_dir: Path, as_json: bool) -> Iterator[Table | str]:
    if as_json:
        yield json.dumps(msgspec.to_builtins(entries), indent=2)
        return
    if not entries:
        yield f"no models in {models_dir}; `aegaeon models pull ID` or `import FILE` brings one"
        return
    table = Table("model", "architecture", "parameters", "on disk", box=None)
    for entry in entries:
        size = f"{entry.disk_bytes / 1e9:.2f} GB"
        if entry.error is not None:
            table.add_row(entry.id, f"damaged: {entry.error}", "", size)
        else:
            parameters = f"{(entry.parameters or 0) / 1e6:.0f} M"
            table.add_row(entry.id, entry.architecture or "", parameters, size)
    yield table
