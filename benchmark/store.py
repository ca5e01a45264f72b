#!/usr/bin/env python3
"""The mailboxes and tables against multiprocessing.Queue, ZeroMQ, memcpy and themselves.

The Redis stores take part where a redis-server is installed, or with --redis-url.
"""

import argparse
import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles

# Started by its path, Python looks beside this file and not in the root of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aegaeon.store.base import MetadataStore
from aegaeon.store.local import LocalDomain
from aegaeon.store.redis import RedisDomain
from aegaeon.store.shm import ShmDomain
from aegaeon.types import InstanceRecord, InstanceStatus
from benchmark.channels import (
    Channel,
    PipeChannel,
    QueueChannel,
    RedisChannel,
    RingChannel,
    Sender,
    ZmqChannel,
)
from benchmark.redis_peer import own_redis
from benchmark.report_rows import Aim, Row, measured, progress, publish

OURS, QUEUE, ZMQ, REDIS = "ShmMailbox", "multiprocessing.Queue", "ZeroMQ", "RedisMailbox"
PIPE = "a bare pipe"  # the limit of wake-ups
SIZES = {"64 B": 64, "1 KiB": 1 << 10, "64 KiB": 64 << 10}
# Records of one run, so that each takes some tenths of a second.
RECORDS = {
    OURS: {64: 1_000_000, 1 << 10: 600_000, 64 << 10: 20_000},
    QUEUE: {64: 30_000, 1 << 10: 30_000, 64 << 10: 4_000},
    ZMQ: {64: 100_000, 1 << 10: 60_000, 64 << 10: 6_000},
    REDIS: {64: 2_000, 1 << 10: 2_000, 64 << 10: 500},
}
AIMS = {QUEUE: Aim("ratio_to_peer", 10, ">= 10x"), ZMQ: Aim("ratio_to_peer", 3, ">= 3x")}
# Between records: so short that a reader of ours looks on instead of sleeping, while nobody else
# wants the processor, and so long that every reader sleeps.
GAPS_S = (0.002, 0.02)


class Pairs:
    """A receiver here and a sender process for each way of sending."""

    def __init__(self, redis_url: str | None) -> None:
        """Start them all."""
        context = multiprocessing.get_context("spawn")
        self.channels: dict[str, Channel] = {
            OURS: RingChannel(),
            QUEUE: QueueChannel(context),
            ZMQ: ZmqChannel(),
        }
        if redis_url:
            self.channels[REDIS] = RedisChannel(redis_url)
        self.channels[PIPE] = PipeChannel(context)
        self.senders = {name: Sender(context, channel) for name, channel in self.channels.items()}

    def close(self) -> None:
        """End all processes and remove what they used."""
        for name, sender in self.senders.items():
            sender.close()
            self.channels[name].close()

    def records_per_s(self, name: str, records: int, record_bytes: int) -> float:
        """Send and receive `records`; the clock starts with the order, so no backlog counts."""
        receive, got = self.channels[name].receive, 0
        start = time.perf_counter()
        self.senders[name].order(records, record_bytes)
        while got < records:
            got += len(receive())
        return records / (time.perf_counter() - start)

    def latencies_us(self, name: str, records: int, gap_s: float) -> list[float]:
        """Send records `gap_s` apart to a waiting reader; return the time each took, one way."""
        self.senders[name].order(records, 64, gap_s)
        receive = self.channels[name].receive
        taken: list[float] = []
        while len(taken) < records:
            batch = receive()
            now = time.perf_counter_ns()
            taken += [(now - int.from_bytes(record[:8], "little")) / 1e3 for record in batch]
        return taken


def measure_throughput(pairs: Pairs, repeats: int, share: float) -> list[Row]:
    """Records/s at each size, runs of all ways of sending alternating."""
    rows: list[Row] = []
    for label, size in SIZES.items():
        progress(f"records/s at {label}")
        runs: dict[str, list[float]] = {name: [] for name in pairs.channels if name != PIPE}
        for _ in range(repeats):
            for name, rates in runs.items():
                count = max(300, int(RECORDS[name][size] * share))
                rates.append(pairs.records_per_s(name, count, size))
        limit = copies_per_s(size)
        case = f"records/s, {label}"
        ours = median(runs[OURS])
        for peer in (name for name in runs if name != OURS):
            row = Row(
                case=case,
                unit="1/s",
                ours=ours,
                peer=peer,
                peer_value=median(runs[peer]),
                limit=limit,
            )
            rows.append(measured(row, AIMS.get(peer)))
    return rows


def measure_wake_up(pairs: Pairs, repeats: int, records: int, gap_s: float) -> list[Row]:
    """One-way times from a sender to a reader that waits; the limit is a bare pipe."""
    progress(f"wake-up latency, {gap_s * 1e3:.0f} ms apart")
    runs: dict[str, list[list[float]]] = {name: [] for name in pairs.channels}
    for _ in range(repeats):
        for name, taken in runs.items():
            taken.append(quantiles(pairs.latencies_us(name, records, gap_s), n=100))
    rows = []
    for percentile in (50, 99):
        value = {name: median(run[percentile - 1] for run in taken) for name, taken in runs.items()}
        for peer in (name for name in value if name not in {OURS, PIPE}):
            row = Row(
                case=f"wake-up p{percentile}, {gap_s * 1e3:.0f} ms apart",
                unit="us",
                ours=value[OURS],
                peer=peer,
                peer_value=value[peer],
                limit=value[PIPE],
            )
            has_aim = percentile == 50 and gap_s == min(GAPS_S)
            aim = Aim("ours", 20, "< 20 us", is_least=False) if has_aim else None
            rows.append(measured(row, aim, less_is_better=True))
    return rows


def copies_per_s(size: int) -> float:
    """Copies of `size` bytes that one core makes per second, in a buffer as long as our ring."""
    source, target = bytes(4 << 20), bytearray(4 << 20)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        target[:] = source
        times.append(time.perf_counter() - start)
    return len(source) / median(times) / size


def measure_routes(
    store: MetadataStore, name: str, routes: int, batch: int, repeats: int
) -> list[Row]:
    """Routes/s early on and after `routes` of them: the cost must not grow."""
    progress(f"routes/s of {name}")
    for number in range(4):
        register(store, number)
    early = routes_per_s(store, 0, batch, repeats)
    for number in range(routes):
        store.record_assignment(f"chatcmpl-{number:032d}", "instance-0", 600.0)
    late = routes_per_s(store, routes, batch, repeats)
    row = Row(
        case=f"routes/s of {name} after {routes:,}",
        unit="1/s",
        ours=late,
        peer=f"after {batch * repeats:,}",
        peer_value=early,
    )
    return [measured(row, Aim("ratio_to_peer", 0.8, "flat: >= 0.8x"))]


def register(store: MetadataStore, number: int) -> None:
    """Enter an instance as a running server would."""
    name = f"instance-{number}"
    record = InstanceRecord(
        id=name,
        incarnation=1,
        role="colocated",
        device="cpu",
        mailbox=f"{name}.1",
        pid=os.getpid(),
        models=("first", "second", "third"),
    )
    store.register_instance(record, 600.0)
    status = InstanceStatus(state="ready", current="first", waiting={"second": number})
    store.update_instance_status(name, 1, status)


def routes_per_s(store: MetadataStore, start_at: int, batch: int, repeats: int) -> float:
    """The median over `repeats` of batches of: look at the table, record an assignment."""
    rates = []
    for repeat in range(repeats):
        names = [f"chatcmpl-{start_at + repeat * batch + n:032d}" for n in range(batch)]
        start = time.perf_counter()
        for name in names:
            instance = store.sync_for_routing()[0]
            store.record_assignment(name, instance.record.id, 600.0)
        rates.append(batch / (time.perf_counter() - start))
    return median(rates)


def measure_stores(redis_url: str | None, is_quick: bool) -> list[Row]:
    """Routes/s of each store."""
    many = 20_000 if is_quick else 1_000_000
    local, shm = LocalDomain(), ShmDomain(f"benchmark-routes-{os.getpid()}")
    try:
        rows = measure_routes(local.metadata(), "the local store", many, 200, 5)
        rows += measure_routes(shm.metadata(), "PosixShmMetadataStore", many, 200, 5)
    finally:
        shm.close()
        shm.unlink()
    if redis_url:
        redis = RedisDomain(f"benchmark-routes-{os.getpid()}", redis_url)
        try:
            few = 1_000 if is_quick else 20_000
            rows += measure_routes(redis.metadata(), "RedisMetadataStore", few, 200, 5)
        finally:
            redis.unlink()
            redis.close()
    return rows


def measure_all(redis_url: str | None, repeats: int, is_quick: bool) -> list[Row]:
    """All rows of mailboxes, then those of tables."""
    repeats, share, spaced = (1, 0.03, 100) if is_quick else (repeats, 1.0, 500)
    pairs = Pairs(redis_url)
    try:
        rows = measure_throughput(pairs, repeats, share)
        for gap_s in GAPS_S:
            rows += measure_wake_up(pairs, repeats, int(spaced * GAPS_S[0] / gap_s) + 50, gap_s)
    finally:
        pairs.close()
    return rows + measure_stores(redis_url, is_quick)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--quick", action="store_true", help="a look that it works, some seconds")
    parser.add_argument("--repeats", type=int, default=5, help="alternating runs of each")
    parser.add_argument("--redis-url", help="this server instead of one of our own")
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        redis_url = options.redis_url or stack.enter_context(own_redis())
        rows = measure_all(redis_url, options.repeats, options.quick)
    publish("store: table and mailboxes", rows, options.json)


if __name__ == "__main__":
    main()
