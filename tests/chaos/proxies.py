"""The proxies of one domain: the server's own, which its supervisor restarts, and workers of one
uvicorn, which does so itself; and which clients each of them serves."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import msgspec

from aegaeon.config import Settings
from tests.support.server import ROOT, Server, is_running

WORKERS = 2
START_S = 60.0
OWN = b"aegaeon.proxy.worker"
WORKER = b"spawn_main"
INSTANCE = b"aegaeon.instance.worker"


class Proxy(msgspec.Struct, frozen=True):
    """A process that serves HTTP at `port`; `is_alone` where nobody else listens there."""

    name: str
    pid: int
    port: int
    is_alone: bool


class Front:
    """`uvicorn aegaeon.proxy:app` with several workers, joined to the domain of a server."""

    def __init__(self, settings: Settings, log: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.log = log
        self._config = log.with_suffix(".json")
        self._config.write_bytes(msgspec.json.encode(settings))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """That of the workers' parent."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it, and wait until all workers have joined."""
        command = [sys.executable, "-m", "uvicorn", "aegaeon.proxy:app", "--no-access-log"]
        command += ["--port", str(self.port), "--workers", str(WORKERS)]
        environment = {**os.environ, "AEGAEON_CONFIG": str(self._config)}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
            )
        deadline_s = time.monotonic() + START_S
        while self.log.read_bytes().count(b"Application startup complete") < WORKERS:
            assert self._process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline_s, self.log.read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        """End it; it must not take long."""
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(START_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise


class Proxies:
    """All of them. `server` and `front` run meanwhile."""

    def __init__(self, server: Server, front: Front) -> None:
        self._server = server
        self._front = front

    def urls(self) -> tuple[str, ...]:
        """Return where clients may ask, once for each process that should be there."""
        return (self._server.url, *(self._front.url for _ in range(WORKERS)))

    def is_alone(self, url: str) -> bool:
        """Whether one process serves there, without which nobody answers."""
        return url == self._server.url

    def living(self) -> list[Proxy]:
        """Return those that live now."""
        own = [
            Proxy("the server's own", pid, self._server.port, is_alone=True)
            for pid in _children(self._server.pid, OWN)
        ]
        workers = [
            Proxy(f"worker {number}", pid, self._front.port, is_alone=False)
            for number, pid in enumerate(_children(self._front.pid, WORKER))
        ]
        return own + workers

    def pids(self) -> set[int]:
        """Return those of all processes that serve, or see to it."""
        return {self._server.pid, self._front.pid, *(proxy.pid for proxy in self.living())}

    def health(self) -> Iterator[dict]:
        """Yield what each says of itself, some perhaps twice. Raises httpx.HTTPError, ValueError"""
        return self._told("/health")

    def served(self) -> Iterator[set[str]]:
        """Yield the models that each takes requests for, as `health`."""
        for told in self._told("/v1/models"):
            yield {one["id"] for one in told["data"] if one["status"] != "draining"}

    def _told(self, path: str) -> Iterator[dict]:
        with httpx.Client(timeout=10.0, limits=httpx.Limits(max_keepalive_connections=0)) as http:
            for url in self.urls() * 3:  # whoever takes the connection answers
                yield http.get(f"{url}{path}").json()


class Deaths:
    """Whose proxy has died, by the ports of the clients that it served at its last moment."""

    def __init__(self) -> None:
        self._struck: list[tuple[float, int, frozenset[int], Proxy]] = []

    def note(self, proxy: Proxy) -> None:
        """It has been stopped, and may never go on."""
        clients = frozenset(_clients_of(proxy))
        self._struck.append((time.monotonic(), proxy.pid, clients, proxy))

    def forget(self, proxy: Proxy) -> None:
        """It goes on."""
        self._struck = [one for one in self._struck if one[1] != proxy.pid or not _lives(one[1])]

    def struck(self, client: int | None, since_s: float) -> bool:
        """Whether the proxy has died that had accepted the connection of `client`, a port, since
        then."""
        return any(
            client in clients and at_s >= since_s and not _lives(pid)
            for at_s, pid, clients, _ in self._struck
        )

    def any_alone(self, since_s: float) -> bool:
        """Whether the only proxy at its port has died since then."""
        return any(
            proxy.is_alone and at_s >= since_s and not _lives(pid)
            for at_s, pid, _, proxy in self._struck
        )


@contextmanager
def front_of(server: Server, settings: Settings) -> Iterator[Front]:
    """Run uvicorn beside `server`."""
    front = Front(settings, server.log.with_name("front.log"))
    front.start()
    try:
        yield front
    finally:
        front.stop()


def instance_pids(server: Server) -> list[int]:
    """Return the processes that are its instances, wherever its table is; the oldest first."""
    return _children(server.pid, INSTANCE)


def _lives(pid: int) -> bool:
    return is_running(pid)


def _children(pid: int, command: bytes) -> list[int]:
    """Return the children whose command line contains `command`, the oldest first."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, file.read_text().split()):
            with suppress(OSError):
                if command in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(child)
    return sorted(found)


def _clients_of(proxy: Proxy) -> Iterator[int]:
    """Yield the ports of the clients whose connections it has accepted, and of those that nobody
    else can accept."""
    inodes = {"0"} if proxy.is_alone else set()
    for name in Path(f"/proc/{proxy.pid}/fd").iterdir():
        with suppress(OSError):
            inodes.add(str(name.readlink()).removeprefix("socket:[").removesuffix("]"))
    here = f"0100007F:{proxy.port:04X}"
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1] == here and fields[9] in inodes:
            yield int(fields[2].rpartition(":")[2], 16)
