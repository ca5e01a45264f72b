"""Which processes of a node live and do nothing: what their supervisor ends and starts again.

An instance keeps its lease by the turns of its loop, and says itself when its compute lane stands.
The proxy answers; what it answers does not matter.
"""

import http.client
import time
from dataclasses import dataclass, field
from pathlib import Path

from aegaeon.child import Child
from aegaeon.config import Settings
from aegaeon.deaths import GRACE_S, LOOK_S
from aegaeon.errors import StoreUnavailable
from aegaeon.ports import reachable
from aegaeon.store.base import MetadataStore
from aegaeon.types import Instance

OUTAGE_S = 10.0  # between looks while the store does not answer
ASK_S = 5.0  # between questions to the proxy
ANSWER_S = 2.0
PROXY_S = 30.0  # without an answer: it also waits for others' processors
START_S = 30.0  # before it is known, without any use of a processor


@dataclass(slots=True)
class _Seen:
    """What is known of one life of a child."""

    incarnation: int
    has_lived: bool = False  # it has been in the table, or has answered
    missing_since_s: float | None = None
    used: int = -1  # of processors while it starts, in ticks, and since when as much
    used_since_s: float = 0.0


@dataclass(slots=True)
class Watch:
    """Owned by the supervisor's thread."""

    settings: Settings
    _seen: dict[str, _Seen] = field(default_factory=dict)
    _look_at_s: float = 0.0
    _ask_at_s: float = 0.0

    def hung(
        self, children: list[Child], proxy: Child | None, store: MetadataStore
    ) -> dict[str, str]:
        """Return the names of those that are to be ended, and why; waits ANSWER_S at most for the
        proxy, and for the store as long as that takes."""
        now = time.monotonic()
        found: dict[str, str] = {}
        if self.settings.watchdog_s <= 0:
            return found
        if now >= self._look_at_s:
            self._look_at_s = now + LOOK_S
            try:
                rows = {row.record.id: row for row in store.sync_for_routing()}
            except StoreUnavailable:
                self._look_at_s = now + OUTAGE_S
            else:
                for child in children:
                    reason = self._of_instance(child, rows.get(child.name), now)
                    if reason:
                        found[child.name] = reason
        if proxy is not None and proxy.process is not None and now >= self._ask_at_s:
            self._ask_at_s = now + ASK_S
            reason = self._of_proxy(proxy, now)
            if reason:
                found[proxy.name] = reason
        return found

    def _of_instance(self, child: Child, row: Instance | None, now: float) -> str:
        if child.process is None:
            return ""
        seen = self._life(child)
        if row is not None and row.record.incarnation == child.incarnation:
            seen.has_lived, seen.missing_since_s = True, None
            if row.status.state == "stuck":
                return f"its compute lane has stood for {self.settings.watchdog_s:.0f} s"
            return ""
        if not seen.has_lived:
            return _of_starting(seen, child.process.pid, now)
        if _is_missing(seen, GRACE_S, now):
            return f"its loop has not turned for {self.settings.lease_s:.0f} s"
        return ""

    def _of_proxy(self, proxy: Child, now: float) -> str:
        seen = self._life(proxy)
        if answers(self.settings.host, self.settings.port):
            seen.has_lived, seen.missing_since_s = True, None
        elif not seen.has_lived:
            assert proxy.process is not None
            return _of_starting(seen, proxy.process.pid, now)
        elif _is_missing(seen, PROXY_S, now):
            return f"it has not answered for {PROXY_S:.0f} s"
        return ""

    def _life(self, child: Child) -> _Seen:
        seen = self._seen.get(child.name)
        if seen is None or seen.incarnation != child.incarnation:
            seen = self._seen[child.name] = _Seen(child.incarnation)
        return seen


def answers(host: str, port: int) -> bool:
    """Say whether a server there answers anything at all within ANSWER_S."""
    connection = http.client.HTTPConnection(reachable(host), port, timeout=ANSWER_S)
    try:
        connection.request("GET", "/health/live")
        connection.getresponse()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True


def _of_starting(seen: _Seen, pid: int, now: float) -> str:
    """Why one is to be ended that nobody has heard of. It may take long where memory is large, but
    is busy then."""
    used = processor_ticks(pid)
    if used != seen.used:
        seen.used, seen.used_since_s = used, now
    if now - seen.used_since_s < START_S:
        return ""
    return f"it has stood in its start for {START_S:.0f} s"


def processor_ticks(pid: int) -> int:
    """Return what the process has used of processors, or -1 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return -1
    fields = text.rpartition(")")[2].split()  # the name may hold anything
    return int(fields[11]) + int(fields[12])  # in user and in system mode


def _is_missing(seen: _Seen, limit_s: float, now: float) -> bool:
    """Whether it has been missing for so long."""
    if seen.missing_since_s is None:
        seen.missing_since_s = now
    return now - seen.missing_since_s >= limit_s
