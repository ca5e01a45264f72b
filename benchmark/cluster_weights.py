#!/usr/bin/env python3
"""How fast a model comes from another node, against a bare socket, a plain copy and uvicorn.

Both nodes are this machine: its loopback is the wire. The server is a process of its own, the files
lie in the system's cache, and where they go is memory (--memory) or a disk (--disk).
"""

import argparse
import hashlib
import http.client
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

# Started by its path, Python looks beside this file and not in the root of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aegaeon.transfer.bring import CONNECTIONS
from aegaeon.transfer.fetch import Sources, fetch
from aegaeon.transfer.manifest import CHUNK_BYTES
from aegaeon.transfer.share import Share, Shelf
from benchmark.random_model import QWEN3_06B, SMALL, write_model
from benchmark.report_rows import Aim, Row, measured, progress, publish

SECRET = b"the secret of a benchmark"
REPEATS = 3
MODEL = "model"
START_S = 30.0


def serve_share(root: str, ready: Connection) -> None:
    """Share the models of `root` until killed; tell the port."""
    share = Share(Shelf({}, Path(root)), SECRET, "127.0.0.1", 0)
    share.start()
    ready.send(share.port)
    threading.Event().wait()


def serve_bare(path: str, ready: Connection) -> None:
    """Send a part of the file, as long as asked in 8 bytes, on each connection."""
    listener = socket.create_server(("127.0.0.1", 0))
    ready.send(listener.getsockname()[1])

    def send(connection: socket.socket) -> None:
        with connection, Path(path).open("rb") as file:
            connection.sendfile(file, 0, int.from_bytes(connection.recv(8), "big"))

    while True:
        connection, _ = listener.accept()
        threading.Thread(target=send, args=(connection,), daemon=True).start()


def serve_uvicorn(path: str, ready: Connection) -> None:
    """Serve the file as starlette does."""
    import uvicorn  # noqa: PLC0415  not before the process is the server's
    from starlette.applications import Starlette  # noqa: PLC0415
    from starlette.requests import Request  # noqa: PLC0415
    from starlette.responses import FileResponse, Response  # noqa: PLC0415
    from starlette.routing import Route  # noqa: PLC0415

    class Large(FileResponse):
        chunk_size = 1 << 20

    async def answer(_request: Request) -> Response:
        return Large(path)

    listener = socket.create_server(("127.0.0.1", 0))
    ready.send(listener.getsockname()[1])
    app = Starlette(routes=[Route("/", answer)])
    uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[listener])


def receive_bare(port: int, size: int, connections: int) -> None:
    """Receive `size` bytes, and do nothing with them."""

    def receive(part: int) -> None:
        view = memoryview(bytearray(CHUNK_BYTES))
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(part.to_bytes(8, "big"))
            while part:
                got = connection.recv_into(view)
                if not got:
                    raise SystemExit("the bare socket ended early")
                part -= got

    with ThreadPoolExecutor(connections) as pool:
        list(pool.map(receive, [size // connections] * connections))


def receive_http(port: int, size: int) -> None:
    """Receive the file from uvicorn, and do nothing with it."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/")
    answer = connection.getresponse()
    view = memoryview(bytearray(1 << 20))
    while got := answer.readinto(view):
        size -= got
    connection.close()
    if size:
        raise SystemExit("uvicorn sent another size")


def copy(source: Path, target: Path) -> None:
    """Read, write and have it on the disk, as `dd bs=8M conv=fsync` does."""
    view = memoryview(bytearray(CHUNK_BYTES))
    with source.open("rb", buffering=0) as file, target.open("wb", buffering=0) as out:
        while got := file.readinto(view):
            out.write(view[:got])
        os.fsync(out.fileno())


def digest(source: Path) -> None:
    """Read, and make SHA-256 of each chunk, in one thread."""
    view = memoryview(bytearray(CHUNK_BYTES))
    with source.open("rb", buffering=0) as file:
        while got := file.readinto(view):
            hashlib.sha256(view[:got]).digest()


class Nodes:
    """The servers, each a process; `close` ends them."""

    def __init__(self, models_dir: Path, weights: Path) -> None:
        """Start them."""
        context = multiprocessing.get_context("spawn")
        self._processes = []
        self.ports = []
        for serve, what in (
            (serve_share, models_dir),
            (serve_bare, weights),
            (serve_uvicorn, weights),
        ):
            near, far = context.Pipe()
            process = context.Process(target=serve, args=(str(what), far), daemon=True)
            process.start()
            self._processes.append(process)
            if not near.poll(START_S):
                raise SystemExit("a server does not start")
            self.ports.append(near.recv())

    def close(self) -> None:
        """End all."""
        for process in self._processes:
            process.kill()
            process.join()


def weights_rows(disk: Path, memory: Path, sizes: dict[str, int], repeats: int) -> Iterator[Row]:
    """Yield rows of fetching a model of `sizes` into `memory` and onto `disk`, runs of ours and of
    what it is held against alternating."""
    with (
        tempfile.TemporaryDirectory(prefix="aegaeon-weights-", dir=memory) as source,
        tempfile.TemporaryDirectory(prefix="aegaeon-weights-", dir=memory) as in_memory,
        tempfile.TemporaryDirectory(prefix="aegaeon-weights-", dir=disk) as on_disk,
    ):
        weights = write_model(Path(source) / MODEL, sizes)
        nodes = Nodes(Path(source), weights)
        try:
            for where, target in (("memory", Path(in_memory)), ("a disk", Path(on_disk))):
                progress(f"a model of {weights.stat().st_size / 1e9:.2f} GB into {where}")
                yield from _rows(where, weights, target, nodes, repeats)
        finally:
            nodes.close()


def _rows(where: str, weights: Path, target: Path, nodes: Nodes, repeats: int) -> Iterator[Row]:
    share, bare, uvicorn = nodes.ports
    size = weights.stat().st_size
    sources = Sources(peers=(f"127.0.0.1:{share}",), secret=SECRET, has_hub=False)
    shared = Sources(shared_dirs=(str(weights.parents[1]),), has_hub=False)
    ways: dict[str, Callable[[], object]] = {
        "node": lambda: fetch(MODEL, target, sources),
        "path": lambda: fetch(MODEL, target, shared),
        "bare": lambda: receive_bare(bare, size, 1),
        "bare4": lambda: receive_bare(bare, size, CONNECTIONS),
        "uvicorn": lambda: receive_http(uvicorn, size),
        "copy": lambda: copy(weights, target / "copy"),
        "digest": lambda: digest(weights),
    }
    fetch(MODEL, target, sources)  # the node makes its digests once
    rates = _rates(ways, target, size, repeats)
    wire = max(rates["bare"], rates["bare4"])
    for case, name, peer, limit in (
        ("from a node", "node", "uvicorn", min(wire, rates["copy"])),
        ("from a shared path", "path", "copy", rates["copy"]),
    ):
        row = Row(
            case=f"a model into {where}, {case}",
            unit="GB/s",
            ours=rates[name],
            peer={"uvicorn": "uvicorn, received only", "copy": "dd-like copy"}[peer],
            peer_value=rates[peer],
            limit=limit,
        )
        yield measured(row, Aim("ratio_to_limit", 0.8, ">= 0.8 of wire or disk"))
    for case, name in (
        ("one bare socket", "bare"),
        (f"{CONNECTIONS} bare sockets", "bare4"),
        (f"dd-like copy to {where}, with fsync", "copy"),
        ("SHA-256 in a thread", "digest"),
    ):
        yield Row(case=f"{case} (beside {where})", unit="GB/s", ours=rates[name])


def _rates(
    ways: dict[str, Callable[[], object]], target: Path, size: int, repeats: int
) -> dict[str, float]:
    """Return the GB/s of each way, of runs of all of them in turn."""
    runs: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            shutil.rmtree(target / MODEL, ignore_errors=True)
            (target / "copy").unlink(missing_ok=True)
            began_s = time.perf_counter()
            way()
            runs[name].append(size / 1e9 / (time.perf_counter() - began_s))
    return {name: median(values) for name, values in runs.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--quick", action="store_true", help="a small model, to see that it runs")
    parser.add_argument("--disk", default=tempfile.gettempdir(), help="a directory on a disk")
    parser.add_argument("--memory", default="/dev/shm", help="a directory in memory")
    options = parser.parse_args(arguments)
    sizes, repeats = (SMALL, 1) if options.quick else (QWEN3_06B, REPEATS)
    rows = list(weights_rows(Path(options.disk), Path(options.memory), sizes, repeats))
    publish("models from node to node", rows, options.json)


if __name__ == "__main__":
    main()
