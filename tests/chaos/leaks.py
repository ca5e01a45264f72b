"""What must not grow or stay: memory of processes, KV, open requests, shared memory."""

import asyncio
import time
from pathlib import Path

import httpx
import msgspec

from aegaeon.memory.kv import KvPool, KvShape
from aegaeon.store.names import KV, region_path
from tests.support.server import Server, left_in_shared_memory

QUIET_S = 30.0
KV_GB = 0.02  # of an instance
KV_SHAPE = KvShape(layers=2, kv_heads=2, head_dim=16)  # of all models
# Allocators keep some of what they had; a leak of a stream's state would be far above.
MOST_GROWTH = 1.25
PAGE = 4096


class Sample(msgspec.Struct, frozen=True):
    """Resident private memory of the server's processes, at a time of the monotonic clock."""

    at_s: float
    private_bytes: int


def private_bytes(server: Server) -> int:
    """Return what the supervisor and its children hold that nobody shares."""
    children = Path(f"/proc/{server.pid}/task").glob("*/children")
    pids = {server.pid, *(int(pid) for file in children for pid in file.read_text().split())}
    return sum(_private(pid) for pid in pids)


def _private(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0
    return (int(fields[1]) - int(fields[2])) * PAGE


async def watch(server: Server, samples: list[Sample], until_s: float) -> None:
    """Add a sample each second until `until_s` of the loop's clock."""
    loop = asyncio.get_running_loop()
    while loop.time() < until_s:
        samples.append(Sample(time.monotonic(), await asyncio.to_thread(private_bytes, server)))
        await asyncio.sleep(1.0)


def growth(samples: list[Sample]) -> float:
    """Return the highest of the last third over that of the second one: the first warms up."""
    third = len(samples) // 3
    if not third:
        return 1.0
    parts = samples[third : 2 * third], samples[2 * third :]
    before, after = (max(sample.private_bytes for sample in part) for part in parts)
    return after / before


async def left_open(server: Server) -> list[str]:
    """Return what is still held some time after the last stream has ended."""
    async with httpx.AsyncClient(timeout=10.0) as http:
        deadline_s = time.monotonic() + QUIET_S
        while True:
            found = await _held(http, server)
            if not found or time.monotonic() > deadline_s:
                return found
            await asyncio.sleep(0.2)


async def _held(http: httpx.AsyncClient, server: Server) -> list[str]:
    try:
        health = (await http.get(f"{server.url}/health")).json()
    except (httpx.HTTPError, ValueError) as error:
        return [f"no health: {error!r}"]
    found = []
    if health["status"] != "ok":
        found.append(f"status {health['status']}")
    if health["open_requests"]:
        found.append(f"{health['open_requests']} open requests at the proxy")
    for one in health["instances"]:
        held = sum(one["waiting"].values()) + sum(one["running"].values())
        if held:
            found.append(f"{held} requests at {one['id']}")
    if len(health["instances"]) != 2:
        found.append(f"{len(health['instances'])} instances")
    found += await asyncio.to_thread(_kept, server)
    return found


def _kept(server: Server) -> list[str]:
    """Return what of the node's KV and weights dead processes and ended requests still hold."""
    found = []
    living = set(server.instance_pids().values())
    with server.weights() as cache:
        for entry in cache.status():
            dead = (set(entry.pin_pids) | set(entry.demand_pids)) - living
            if dead:
                found.append(f"{entry.model} is pinned or wanted by {len(dead)} dead processes")
    path = region_path(server.shared_memory, server.domain, KV)
    pool = KvPool(2 * round(KV_GB * 1e9), [KV_SHAPE], str(path))
    try:
        pool._native.reclaim()
        held = pool.capacity_blocks(KV_SHAPE) - pool.free_blocks(KV_SHAPE)
    finally:
        pool.close()
    return [*found, f"{held} KV blocks are held"] if held else found


def left_behind(domain: str) -> list[str]:
    """Return what an ended server has left in shared memory."""
    return [f"left in shared memory: {name}" for name in left_in_shared_memory(domain)]
