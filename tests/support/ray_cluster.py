"""A Ray cluster of one's own on this machine, of several nodes, with Redis beside it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import redis

from aegaeon.ports import free_port
from aegaeon.store.redis import RedisDomain
from aegaeon.types import Instance, InstanceRecord
from tests.support.server import SHARED_MEMORY, Server, run_cli

# 78 MB is the least that Ray takes for objects, of which we make none.
OBJECT_BYTES = 100 << 20


def require_ray() -> None:
    """Skip the test where Ray is not installed."""
    if util.find_spec("ray") is None:
        pytest.skip("Ray is not installed (pip install 'aegaeon[ray]')")


@contextmanager
def ray_cluster(*nodes: dict[str, Any]) -> Iterator[Any]:
    """Yield a cluster whose head runs nothing, with `nodes` beside it; it is joined, too."""
    os.environ.update(RAY_DEDUP_LOGS="0", RAY_USAGE_STATS_ENABLED="0")
    import ray  # noqa: PLC0415  an extra
    from ray.cluster_utils import Cluster  # noqa: PLC0415

    head = {"num_cpus": 0, "object_store_memory": OBJECT_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for node in nodes:
            add_node(cluster, **node)
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        yield cluster
    finally:
        with suppress(Exception):
            ray.shutdown()
        cluster.shutdown()


def add_node(cluster: Any, **what: Any) -> Any:
    """Add a node with `what`, of resources and labels."""
    return cluster.add_node(**{"num_cpus": 2, "object_store_memory": OBJECT_BYTES, **what})


class ClusteredServer(Server):
    """`aegaeon serve --cluster`: a server on a Ray cluster, over Redis."""

    def __init__(
        self, directory: Path, models: dict[str, Path], address: str, redis_url: str, *flags: str
    ) -> None:
        over = ("--cluster", address, "--metadata-backend", "redis", "--redis-url", redis_url)
        super().__init__(directory, models, *over, *flags)
        self.models = models
        self._redis_url = redis_url
        self._free_port = free_port("127.0.0.1")

    def start(self, port: int = 0) -> "ClusteredServer":
        """Start it, or find it again, on a port that stays."""
        super().start(port or self._free_port)
        return self

    def records(self) -> dict[str, InstanceRecord]:
        """Return the instances' records, by name."""
        return {row.record.id: row.record for row in self._rows()}

    def ready(self) -> set[str]:
        """Return the names of those that take requests."""
        return {name for name, status in self.statuses().items() if status.state == "ready"}

    def status(self) -> dict[str, Any]:
        """Return what `aegaeon status --json` says."""
        told = run_cli("status", "--url", self.url, "--json")
        assert told.returncode == 0, told.stderr
        return json.loads(told.stdout)

    def keys(self) -> list[bytes]:
        """Return what Redis holds of its domain."""
        with redis.Redis.from_url(self._redis_url) as client:
            return client.keys(f"*{self.domain}*")

    def left_in_shared_memory(self) -> list[str]:
        """Return the names that it has in the shared memory of any node."""
        return sorted(path.name for path in SHARED_MEMORY.glob(f"aegaeon-{self.domain}-*"))

    def _rows(self) -> tuple[Instance, ...]:
        domain = RedisDomain(self.domain, self._redis_url)
        try:
            return domain.metadata().sync_for_routing()
        finally:
            domain.close()


def actor_pid(name: str) -> int:
    """Return the pid of the actor of this name; 0 while it does not live."""
    import ray  # noqa: PLC0415  an extra

    for actor in ray._private.state.actors().values():
        if actor["Name"] == name and actor["State"] == "ALIVE":
            return int(actor["Pid"])
    return 0


def parent_of(pid: int) -> int:
    """Return the pid of the process that has started `pid`: of an instance, its actor."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    return int(stat.rpartition(")")[2].split()[1])
