"""The commands `aegaeon models share` and `fetch`: models from node to node."""

import argparse
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from aegaeon.errors import ConfigError, ModelNotFound
from aegaeon.flags import Parser
from aegaeon.models.references import id_of_directory, locate, split_reference
from aegaeon.transfer.fetch import Sources, fetch
from aegaeon.transfer.share import Share, Shelf
from aegaeon.transfer.wire import read_secret, split_address

PORT = 8091


def add_sharing(commands: "argparse._SubParsersAction[Parser]", shared: Parser) -> None:
    """Add the two commands; `shared` has the flags of all."""
    secret = "file with what all nodes of the cluster know, and nobody else"
    sharing = commands.add_parser(
        "share", parents=[shared], help="let other nodes fetch this one's models"
    )
    sharing.add_argument(
        "models",
        nargs="*",
        metavar="NAME",
        help="those to share: names, directories or NAME=DIRECTORY (default: the models directory)",
    )
    sharing.add_argument("--host", default="127.0.0.1", help="address to listen on")
    sharing.add_argument("--port", type=int, default=PORT, help=f"port (default: {PORT})")
    sharing.add_argument("--secret-file", metavar="FILE", required=True, help=secret)
    fetching = commands.add_parser(
        "fetch", parents=[shared], help="bring a model from another node, a directory or the hub"
    )
    fetching.add_argument("model", metavar="NAME", help="its name, like Qwen/Qwen3-0.6B")
    fetching.add_argument(
        "--from", dest="peers", metavar="HOST:PORT,..", default="", help="nodes that may have it"
    )
    fetching.add_argument(
        "--shared", metavar="DIR,..", default="", help="models directories of a shared file system"
    )
    fetching.add_argument("--secret-file", metavar="FILE", help=secret)
    fetching.add_argument("--digest", default="", help="of the content wanted (default: any)")
    fetching.add_argument(
        "--no-hub", action="store_true", help="do not ask the hub when no other has it"
    )


def share_models(options: argparse.Namespace, models_dir: Path) -> Iterator[str]:
    """Serve until told to stop; yield where. Raises ConfigError, ModelNotFound, TransferError."""
    secret = read_secret(options.secret_file)
    models = dict(_named(reference, models_dir) for reference in options.models)
    shelf = Shelf(models, None if models else models_dir)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    share = Share(shelf, secret, options.host, options.port)
    try:
        share.start()
        share.prepare()
        yield f"shares {len(shelf.models())} models at {options.host}:{share.port}"
        stop.wait()
    finally:
        share.close()


def fetch_model(options: argparse.Namespace, models_dir: Path) -> str:
    """Fetch with a bar on stderr, and return where the model is. Raises what `fetch` does."""
    peers = _parts(options.peers)
    for peer in peers:
        split_address(peer)
    if peers and options.secret_file is None:
        raise ConfigError("nodes give models to who knows the cluster's secret: --secret-file FILE")
    sources = Sources(
        shared_dirs=_parts(options.shared),
        peers=peers,
        secret=read_secret(options.secret_file) if peers else b"",
        digest=options.digest,
        has_hub=not options.no_hub,
    )
    with tqdm(desc=options.model, unit="B", unit_scale=True, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return str(fetch(options.model, models_dir, sources, show))


def _named(reference: str, models_dir: Path) -> tuple[str, Path]:
    name, target = split_reference(reference)
    path = locate(target, models_dir)
    if path is None:
        raise ModelNotFound(f"no model {target!r} is here; see `aegaeon models list`")
    return name or id_of_directory(path), path.absolute()


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
