"""What must not grow or stay: memory of processes, KV, open requests, shared memory."""

import asyncio
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import httpx
import msgspec

from aegaeon.memory.kv import KvPool, KvShape
from aegaeon.store.names import KV, MAILBOX, region_path
from tests.chaos.proxies import Proxies, instance_pids
from tests.support.server import Server, is_running, left_in_shared_memory

QUIET_S = 30.0
INSTANCES = 2
MODELS = 6
MARK = f"CHAOS={os.getpid()}"  # in the environment of all that is started
KV_GB = 0.02  # of an instance
KV_SHAPE = KvShape(layers=2, kv_heads=2, head_dim=16)  # of all models
# Allocators keep some of what they had; a leak of a stream's state would be far above.
MOST_GROWTH = 1.25
PAGE = 4096


class Sample(msgspec.Struct, frozen=True):
    """Resident private memory of the server's processes, at a time of the monotonic clock."""

    at_s: float
    private_bytes: int


def private_bytes(parents: Iterable[int]) -> int:
    """Return what these processes and their children hold that nobody shares."""
    pids = set(parents)
    for parent in tuple(pids):
        for file in Path(f"/proc/{parent}/task").glob("*/children"):
            with suppress(OSError):  # its parent has just ended
                pids.update(map(int, file.read_text().split()))
    return sum(_private(pid) for pid in pids)


def _private(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0
    return (int(fields[1]) - int(fields[2])) * PAGE


async def watch(proxies: Proxies, samples: list[Sample]) -> None:
    """Add a sample each second until cancelled."""
    while True:
        held = await asyncio.to_thread(lambda: private_bytes(proxies.pids()))
        samples.append(Sample(time.monotonic(), held))
        await asyncio.sleep(1.0)


def growth(samples: list[Sample]) -> float:
    """Return the highest of the last third over that of the second one: the first warms up."""
    third = len(samples) // 3
    if not third:
        return 1.0
    parts = samples[third : 2 * third], samples[2 * third :]
    before, after = (max(sample.private_bytes for sample in part) for part in parts)
    return after / before


async def left_open(server: Server, proxies: Proxies) -> list[str]:
    """Return what is still held some time after the last stream has ended."""
    deadline_s = time.monotonic() + QUIET_S
    while True:
        found = await asyncio.to_thread(_held, server, proxies)
        if not found or time.monotonic() > deadline_s:
            return found
        await asyncio.sleep(0.5)


def _held(server: Server, proxies: Proxies) -> list[str]:
    found = []
    try:
        for health in proxies.health():
            found += _told(health)
        for served in proxies.served():
            if len(served) != MODELS:
                found.append(f"{len(served)} models are served")
    except (httpx.HTTPError, ValueError) as error:
        return [f"no health: {error!r}"]
    if len(proxies.living()) != len(proxies.urls()):
        found.append(f"{len(proxies.living())} proxies")
    return found + _kept(server) + _mailboxes(server, proxies)


def _told(health: dict) -> list[str]:
    """Return what a proxy says is held, at it and at the instances."""
    found = []
    if health["status"] != "ok":
        found.append(f"status {health['status']}")
    if health["open_requests"]:
        found.append(f"{health['open_requests']} open requests at a proxy")
    for one in health["instances"]:
        held = sum(one["waiting"].values()) + sum(one["running"].values())
        if held:
            found.append(f"{held} requests at {one['id']}")
    if len(health["instances"]) != INSTANCES:
        found.append(f"{len(health['instances'])} instances")
    return found


def _mailboxes(server: Server, proxies: Proxies) -> list[str]:
    """Return the segments of the dead: who lives has one mailbox each, or none here."""
    found = list(server.shared_memory.glob(f"aegaeon-{server.domain}.{MAILBOX}+*"))
    most = INSTANCES + len(proxies.living())
    names = ", ".join(sorted(path.name.rpartition("+")[2] for path in found))
    return (
        [f"{len(found)} mailboxes, of which {most} are read: {names}"] if len(found) > most else []
    )


def _kept(server: Server) -> list[str]:
    """Return what of the node's KV and weights dead processes and ended requests still hold."""
    found = []
    living = set(instance_pids(server))
    with server.weights() as cache:
        for entry in cache.status():
            dead = (set(entry.pin_pids) | set(entry.demand_pids)) - living
            if dead:
                found.append(f"{entry.model} is pinned or wanted by {len(dead)} dead processes")
    path = region_path(server.shared_memory, server.domain, KV)
    pool = KvPool(INSTANCES * round(KV_GB * 1e9), [KV_SHAPE], str(path))
    try:
        pool._native.reclaim()
        held = pool.capacity_blocks(KV_SHAPE) - pool.free_blocks(KV_SHAPE)
    finally:
        pool.close()
    return [*found, f"{held} KV blocks are held"] if held else found


def left_behind(domain: str) -> list[str]:
    """Return what an ended server has left in shared memory, and processes that do not end."""
    left = [f"left in shared memory: {name}" for name in left_in_shared_memory(domain)]
    deadline_s = time.monotonic() + QUIET_S
    while (running := _running()) and time.monotonic() < deadline_s:
        time.sleep(0.2)
    return left + running


def _running() -> list[str]:
    """Return the processes that others have started who were marked as ours."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            pid = int(directory.name)
            is_ours = MARK.encode() in (directory / "environ").read_bytes().split(b"\0")
            if is_ours and pid != os.getpid() and is_running(pid):
                command = (directory / "cmdline").read_bytes().replace(b"\0", b" ")
                found.append(f"still runs: {command[:120].decode(errors='replace')}")
    return found
