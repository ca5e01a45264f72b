"""A Redis server of one's own, on a free port, that keeps all it acknowledges and can be killed."""

import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import redis

from aegaeon.ports import free_port

BINARY = shutil.which("redis-server")


class RedisServer:
    """A server process with append-only persistence in `directory`; `stop` leaves the files.
    `flags` go to redis-server; TLS is spoken where they say so, and `query` then tells clients."""

    def __init__(
        self,
        directory: Path,
        password: str = "",
        flags: tuple[str, ...] = (),
        query: str = "",
        host: str = "127.0.0.1",
    ) -> None:
        self._host = host
        self.port = free_port(host)
        self._flags = flags
        self._is_tls = "--tls-cert-file" in flags
        self._directory = directory
        self._password = password
        self._process: subprocess.Popen[bytes] | None = None
        login = f":{password}@" if password else ""
        scheme = "rediss" if self._is_tls else "redis"
        self.url = f"{scheme}://{login}{host}:{self.port}/0{query}"

    def start(self, persistent: bool = True) -> None:
        """Start it and wait until it answers."""
        assert BINARY is not None
        ports = ["--port", "0", "--tls-port"] if self._is_tls else ["--port"]
        command = [BINARY, *ports, str(self.port), "--bind", self._host, "--save", ""]
        command += ["--dir", str(self._directory), "--daemonize", "no", "--logfile", "server.log"]
        if persistent:
            command += ["--appendonly", "yes", "--appendfsync", "always"]
        if self._password:
            command += ["--requirepass", self._password]
        self._process = subprocess.Popen([*command, *self._flags])
        deadline = time.monotonic() + 20
        with redis.Redis.from_url(self.url) as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.exceptions.ConnectionError:
                    assert self._process.poll() is None, "redis-server ended; see its server.log"
                    assert time.monotonic() < deadline, "redis-server does not answer"
                    time.sleep(0.01)

    def pause(self) -> None:
        """SIGSTOP it: it holds its connections, and says nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT it, if it has been paused."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL it: nothing is said to clients, nothing is flushed."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def require_redis() -> None:
    """Skip the test where no redis-server is installed."""
    if BINARY is None:
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
