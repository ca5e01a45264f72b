"""Other servers of several models, started with the same weights under the same names as ours."""

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmark.serve_load import Dialect
from benchmark.serving import ServerError, free_port, running_command

SETTLE_S = 1.0  # a port may be open before the routes are


@dataclass(frozen=True)
class Weights:
    """What all names stand for: a checkpoint's directory, and the same as one GGUF file."""

    names: Sequence[str]
    checkpoint: Path
    gguf: Path | None


@dataclass(frozen=True)
class Peer:
    """How to run one: `start` serves the weights from an empty directory, with further flags, and
    yields the URL."""

    dialect: Dialect
    start: Callable[[Weights, Path, Sequence[str], IO[str]], AbstractContextManager[str]]


@contextmanager
def _llama_server(
    weights: Weights, directory: Path, flags: Sequence[str], log: IO[str]
) -> Iterator[str]:
    """llama.cpp's server as a router: a process of its own for each model, all of them loaded."""
    if weights.gguf is None:
        raise ServerError("llama-server reads GGUF: give --gguf FILE, in the type of our weights")
    for name in weights.names:
        (directory / f"{name}.gguf").symlink_to(weights.gguf.resolve())
    port = free_port()
    command = ["llama-server", "--models-dir", str(directory), "--models-max", "0"]
    command += ["--host", "127.0.0.1", "--port", str(port), *flags]
    with running_command(command, port, log) as url:
        time.sleep(SETTLE_S)
        yield url


@contextmanager
def _transformers(
    weights: Weights, directory: Path, flags: Sequence[str], log: IO[str]
) -> Iterator[str]:
    """`transformers serve`, which loads what is asked for, by the path of a checkpoint."""
    for name in weights.names:
        (directory / name).symlink_to(weights.checkpoint.resolve())
    beside = Path(sys.executable).with_name("transformers")
    program = str(beside) if beside.exists() else shutil.which("transformers") or "transformers"
    port = free_port()
    command = [program, "serve", "--host", "127.0.0.1", "--port", str(port), *flags]
    with running_command(command, port, log, cwd=directory) as url:
        time.sleep(SETTLE_S)
        yield url


PEERS = {
    "llama-server": Peer("vllm", _llama_server),
    "transformers": Peer("transformers", _transformers),
}
