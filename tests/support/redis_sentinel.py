"""A Redis master, a replica and a Sentinel that fails over in about a second."""

import subprocess
from pathlib import Path

import redis

from aegaeon.ports import free_port
from tests.support.polling import eventually
from tests.support.redis_server import BINARY, RedisServer
from tests.support.wire import Cable

SERVICE = "main"


class Failover:
    """Two servers, `master` and `replica` as they began, and one Sentinel at `url`."""

    def __init__(self, directory: Path) -> None:
        self.master = self._server(directory / "one")
        self.master.start(persistent=False)
        self._wire = Cable(self.master.port)
        of_master = ("--replicaof", f"127.0.0.1 {self._wire.port}")
        self.replica = self._server(directory / "two", *of_master)
        self.replica.start(persistent=False)
        self._port = free_port("127.0.0.1")
        self.url = f"redis+sentinel://127.0.0.1:{self._port}/{SERVICE}/0"
        told = directory / "sentinel.conf"
        told.write_text(
            f"port {self._port}\nbind 127.0.0.1\ndir {directory}\nlogfile sentinel.log\n"
            f"sentinel monitor {SERVICE} 127.0.0.1 {self.master.port} 1\n"
            f"sentinel down-after-milliseconds {SERVICE} 400\n"
            f"sentinel failover-timeout {SERVICE} 2000\n"
        )
        assert BINARY is not None
        self._sentinel = subprocess.Popen([BINARY, str(told), "--sentinel"])
        self._client = redis.Redis(port=self._port)
        eventually(self._has_replica, within_s=20)
        self.wait_heard()

    def fail_over(self) -> None:
        """Kill the master and wait until the replica has its place."""
        self.master.kill()
        self.wait_promoted()

    def wait_promoted(self) -> None:
        """Wait until the Sentinel names the replica."""
        eventually(lambda: self.port() == self.replica.port, within_s=20)

    def cut(self) -> None:
        """From now on the replica hears nothing more of the master, and nobody notices."""
        self._wire.cut()

    def wait_heard(self) -> None:
        """Wait until the replica has all that the master has."""
        with redis.Redis(port=self.master.port, socket_timeout=30) as client:
            assert client.wait(1, 20_000) == 1

    def port(self) -> int:
        """Where the Sentinel says that the master is."""
        return int(self._client.sentinel_get_master_addr_by_name(SERVICE)[1])

    def close(self) -> None:
        """End all three."""
        self._client.close()
        self._sentinel.kill()
        self._sentinel.wait()
        self.replica.kill()
        self.master.kill()
        self._wire.close()

    def _has_replica(self) -> bool:
        try:
            found = self._client.sentinel_slaves(SERVICE)
        except redis.exceptions.RedisError:
            return False
        return any(one["port"] == self.replica.port and not one["is_disconnected"] for one in found)

    @staticmethod
    def _server(directory: Path, *flags: str) -> RedisServer:
        directory.mkdir(parents=True)
        return RedisServer(directory, flags=("--repl-diskless-sync-delay", "0", *flags))
