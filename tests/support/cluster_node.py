"""Nodes of a cluster without Ray: each is one process, with the members that would be an actor each
and a shared memory of its own, perhaps at a place of its own (netns.py)."""

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import httpx
import msgspec

from aegaeon import _native
from aegaeon.cluster.member import Member, MemberLaunch, MemberLook
from aegaeon.cluster.plan import MemberPlan
from aegaeon.config import Settings, check_settings
from aegaeon.keeper import bounds_of
from aegaeon.models.references import served_models
from aegaeon.ports import free_port
from aegaeon.specs import Catalog
from aegaeon.store.redis import RedisDomain
from aegaeon.types import InstanceRecord
from tests.support.checkpoints import make_checkpoint
from tests.support.netns import Place
from tests.support.polling import eventually
from tests.support.server import ROOT, SHARED_MEMORY

PORT = 8000  # of a proxy at a place of its own
END_S = 30.0


class Node:
    """A process at `place`, or here. `kill` takes all that it has started along."""

    def __init__(self, name: str, launches: Sequence[MemberLaunch], log: Path, place: Place | None):
        self.name, self.log, self.place = name, log, place
        self._launches = launches
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; its members come up by themselves."""
        wrapper = self.place.wrapper if self.place is not None else ()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*wrapper, sys.executable, "-m", __name__],
                stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=ROOT, start_new_session=True,
            )  # fmt: skip
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(self._launches))
        self._process.stdin.close()

    def kill(self) -> None:
        """SIGKILL all its processes, as where its machine loses power."""
        assert self._process is not None
        for pid in _with_descendants(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait(END_S)

    def stop(self) -> None:
        """Drain it, and wait for its end. Idempotent."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise


class Cluster:
    """A front with a proxy, and nodes with an instance each, over the Redis at `redis_url`."""

    def __init__(self, directory: Path, redis_url: str, places: Sequence[Place | None], **settings):
        """The first of `places` is the front's."""
        self.domain = f"test-{uuid.uuid4().hex[:8]}"
        given = {"device": "cpu", "domain": self.domain, "cluster": "auto"}
        given |= {"metadata_backend": "redis", "redis_url": redis_url}
        given |= {"colocated_count": 1, "threads_per_instance": 1, "log_level": "info"}
        given |= {"model_cache_budget_gb": 0.1, "kv_budget_gb": 0.1, "drain_s": 1.0}
        self.settings = check_settings(given | settings)
        specs = served_models(self.settings)
        self._store = RedisDomain(self.domain, redis_url)
        first = Catalog(models=specs, bounds=bounds_of(self.settings))
        self.catalog = self._store.catalog().change(lambda _: first)
        host = places[0].host if places[0] is not None else "127.0.0.1"
        port = PORT if places[0] is not None else free_port(host)
        self.url = f"http://{host}:{port}"
        front = msgspec.structs.replace(self.settings, host=host, port=port)
        self.front = self._node("front", "proxy", front, directory, places[0])
        self.nodes = [
            self._node(f"node-{rank}", "instance", self.settings, directory, place)
            for rank, place in enumerate(places[1:])
        ]

    def instances(self) -> dict[str, InstanceRecord]:
        """Return the records of those that are ready, by node."""
        rows = self._store.metadata().sync_for_routing()
        return {row.record.node: row.record for row in rows if row.status.state == "ready"}

    def wait_ready(self, within_s: float = 60.0) -> None:
        """Wait until all nodes serve, and the front listens."""
        eventually(lambda: len(self.instances()) == len(self.nodes), within_s)
        eventually(self._is_listening, within_s)

    def is_unready(self) -> bool:
        """Whether the front says that it cannot serve; raises where it does not answer."""
        return httpx.get(f"{self.url}/health/ready", timeout=20).status_code == 503

    def node_of(self, instance: str) -> Node:
        """Return the node of an instance, by its name."""
        return next(node for node in self.nodes if instance == f"instance-{node.name}-0")

    def __enter__(self) -> "Cluster":
        """Start all, and wait."""
        for node in (self.front, *self.nodes):
            node.start()
        try:
            self.wait_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop all; nothing is left."""
        self._stop()
        start = f"aegaeon-{self.domain}"
        eventually(lambda: not list(SHARED_MEMORY.glob(f"{start}*")), within_s=30)

    def _stop(self) -> None:
        for node in (self.front, *self.nodes):
            node.stop()
        self._store.unlink()
        self._store.close()

    def _is_listening(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health/ready", timeout=10).is_success
        except httpx.TransportError:
            return False

    def _node(
        self, name: str, kind: str, settings: Settings, directory: Path, place: Place | None
    ) -> Node:
        member = "proxy-0" if kind == "proxy" else f"instance-{name}-0"
        plan = MemberPlan(name=member, kind=kind, node=name, settings=settings)
        launch = MemberLaunch(plan=plan, address="", catalog=self.catalog)
        return Node(name, [launch], directory / f"{name}.log", place)


def make_model(directory: Path) -> tuple[str, ...]:
    """Write the model `ada`; return the setting that names it."""
    ada = make_checkpoint(directory / "ada", "llama", seed=1, max_position_embeddings=4096)
    return (f"ada={ada}",)


def _with_descendants(pid: int) -> list[int]:
    found = [pid]
    for one in found:  # grows meanwhile
        for file in Path(f"/proc/{one}/task").glob("*/children"):
            with suppress(OSError):
                found += map(int, file.read_text().split())
    return found


def main() -> None:
    """Run the members that stdin tells of, until SIGTERM."""
    _native.die_with_parent(signal.SIGKILL, os.getppid())
    launches = msgspec.json.decode(sys.stdin.buffer.read(), type=list[MemberLaunch])
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    members = [Member(msgspec.json.encode(launch)) for launch in launches]
    while not ended.wait(1.0):
        pass
    for member in members:
        member.drain()
    while not all(_has_ended(member) for member in members):
        time.sleep(0.1)


def _has_ended(member: Member) -> bool:
    look = msgspec.json.decode(member.look(), type=MemberLook)
    return look.state in ("ended", "failed")


if __name__ == "__main__":
    main()
