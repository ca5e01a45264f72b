"""Nodes of a cluster on this machine, each with shared memory of its own, over one Redis: members
as processes, without Ray, and without a controller that would start or end any."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path

import msgspec

from aegaeon.cluster.member import MemberLaunch
from aegaeon.cluster.plan import MemberPlan
from aegaeon.config import Settings
from aegaeon.specs import Catalog
from aegaeon.store.redis import RedisDomain
from aegaeon.types import ModelSpec
from tests.support.polling import eventually
from tests.support.server import ROOT, SHARED_MEMORY

READY_S = 60.0
NODES = ("node-one-of-two", "node-two-of-two")


class Member:
    """A process that is a member, from here until `drain` or `kill`."""

    def __init__(self, plan: MemberPlan, catalog: Catalog, log: Path) -> None:
        self.name = plan.name
        launch = MemberLaunch(plan=plan, address="127.0.0.1", catalog=catalog)
        self._looks: deque[dict] = deque(maxlen=1)
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.member"],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
            )
        self._process.stdin.write(msgspec.json.encode(launch) + b"\n")
        self._process.stdin.flush()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def look(self) -> dict:
        """What it said last of itself."""
        return self._looks[-1] if self._looks else {"state": "starting"}

    def wait_ready(self) -> "Member":
        eventually(lambda: self.look()["state"] in ("ready", "failed"), within_s=READY_S)
        assert self.look()["state"] == "ready", self.look()
        return self

    def drain(self) -> None:
        """Ask it to drain; `wait` for its end."""
        self._process.stdin.close()

    def wait(self) -> None:
        self._process.wait(READY_S)
        self._reader.join(READY_S)
        self._process.stdout.close()

    def kill(self) -> None:
        """What it started ends with it."""
        self._process.send_signal(signal.SIGKILL)
        self.wait()

    def stop(self) -> None:
        """Drain, if it lives."""
        if self._process.poll() is None:
            if not self._process.stdin.closed:
                self.drain()
            self.wait()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._looks.append(json.loads(line))


class TwoNodes:
    """A proxy, and what `begin` starts on the nodes."""

    def __init__(self, directory: Path, settings: Settings, specs: tuple[ModelSpec, ...]) -> None:
        self.log = directory / "members.log"
        self._settings = settings
        self._members: dict[str, Member] = {}
        domain = self._domain()
        self._catalog = domain.catalog().change(lambda _: Catalog(version=1, models=specs))
        domain.close()
        self.url = self.begin("proxy-0", NODES[0], kind="proxy").wait_ready().look()["url"]

    def begin(self, name: str, node: str, index: int = 0, kind: str = "instance", **changes):
        """Start a member, with other settings where that is said."""
        settings = msgspec.structs.replace(self._settings, **changes)
        plan = MemberPlan(name=name, kind=kind, node=node, settings=settings, index=index)
        member = self._members[name] = Member(plan, self._catalog, self.log)
        return member

    def member(self, name: str) -> Member:
        return self._members[name]

    def rows(self):
        domain = self._domain()
        try:
            return {row.record.id: row for row in domain.metadata().sync_for_routing()}
        finally:
            domain.close()

    def requests(self) -> int:
        return sum(
            sum(row.status.waiting.values()) + sum(row.status.running.values())
            for row in self.rows().values()
        )

    def left_in_shared_memory(self) -> list[str]:
        return sorted(p.name for p in SHARED_MEMORY.glob(f"aegaeon-{self._settings.domain_name}-*"))

    def _domain(self) -> RedisDomain:
        return RedisDomain(self._settings.domain_name, self._settings.redis_url)

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        for member in reversed(self._members.values()):
            member.stop()
