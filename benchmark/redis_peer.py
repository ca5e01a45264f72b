"""A Redis server for the length of a benchmark, where the program is installed."""

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import redis

from aegaeon.ports import free_port

START_S = 20.0


@contextlib.contextmanager
def own_redis(is_tcp: bool = False) -> Iterator[str | None]:
    """Start a server on a Unix socket of its own, or on a port of this machine as where others
    reach it, and yield its URL; None without the program.

    It keeps everything in memory: what is measured is the store, not a disk.
    """
    binary = shutil.which("redis-server")
    if binary is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="aegaeon-benchmark-") as directory:
        socket = Path(directory) / "socket"
        port = free_port("127.0.0.1") if is_tcp else 0
        command = [binary, "--port", str(port), "--unixsocket", str(socket), "--dir", directory]
        command += ["--save", "", "--appendonly", "no"]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            url = f"redis://127.0.0.1:{port}/0" if is_tcp else f"unix://{socket}"
            _wait_until_it_answers(url, server)
            yield url
        finally:
            server.terminate()
            server.wait()


def _wait_until_it_answers(url: str, server: "subprocess.Popen[bytes]") -> None:
    deadline_s = time.monotonic() + START_S
    with redis.Redis.from_url(url) as client:
        while True:
            try:
                client.ping()
                return
            except redis.exceptions.ConnectionError:
                if server.poll() is not None or time.monotonic() > deadline_s:
                    raise SystemExit("redis-server does not start; use --redis-url") from None
                time.sleep(0.01)
