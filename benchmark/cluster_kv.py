#!/usr/bin/env python3
"""How fast keys and values go from node to node, against a bare socket, and what others notice.

Both nodes are this machine: its loopback is the wire, and its processors are shared by both ends.
The sender is a process of its own; the receiver is an engine that decodes at the same time, or not.
"""

import argparse
import multiprocessing
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import msgspec

# Started by its path, Python looks beside this file and not in the root of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aegaeon.config import Settings
from aegaeon.engine.exchange import KvExchange
from aegaeon.engine.kv_place import layout_of
from aegaeon.engine.shared import DTYPES, kv_shapes
from aegaeon.handles import KvStream
from aegaeon.instance.kv_share import KvShare
from aegaeon.instance.pulls import Pulls
from aegaeon.memory.kv import BLOCK_TOKENS, KvPool, KvShape, blocks_for
from aegaeon.models.references import resolve
from aegaeon.sampling import SamplingParams
from aegaeon.scheduler.moving import Links
from aegaeon.types import KvHandle, Request, Transfer
from benchmark.random_model import WIDE_KV, write_model
from benchmark.report_rows import Aim, Row, measured, progress, publish
from benchmark.switch_engine import Driver

MODEL = "model"
TOKENS = 1024  # of a request that moves, 256 KiB each
REPEATS = 7
OTHERS, OTHERS_TOKENS = 4, 64  # requests that decode meanwhile, and their prompts
STEPS = 200  # of theirs, alone and beside KV that comes
START_S, WITHIN_S = 60.0, 30.0
PIECE_BYTES = 4 << 20
STORED = Settings().stored_kv  # how keys and values are kept


def serve(shape: tuple[int, int, int], tokens: int, ready: Connection) -> None:
    """Offer KV of `tokens`, and as many bytes on a bare socket; tell where, until killed."""
    sizes = KvShape(*shape, DTYPES[STORED])
    count = blocks_for(tokens)
    pool = KvPool((count + 64) * sizes.block_bytes * 2, [sizes])
    views = pool.bytes_of(sizes, pool.allocate(sizes, count))
    for number, view in enumerate(views):
        view[:] = bytes([number % 251 + 1]) * len(view)
    share = KvShare("127.0.0.1", Links())
    stream = share.offer(views, 3600.0)
    listener = socket.create_server(("127.0.0.1", 0))
    ready.send((stream.address, stream.name, stream.token, listener.getsockname()[1]))
    while True:
        connection, _ = listener.accept()
        with connection:
            for view in views:
                connection.sendall(view)


def receive_bare(port: int, into: memoryview) -> None:
    """Receive as much as goes into `into`."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        while into:
            got = connection.recv_into(into[:PIECE_BYTES])
            if not got:
                raise SystemExit("the bare socket ended early")
            into = into[got:]


class Receiver:
    """Brings the KV of one offer, again and again."""

    def __init__(self, exchange: KvExchange, kv: KvHandle) -> None:
        self._exchange = exchange
        self._woken = threading.Event()
        self._pulls = Pulls(exchange, self._woken.set)
        request = Request(
            id="moved",
            model=MODEL,
            prompt_token_ids=(1,),
            sampling=SamplingParams(temperature=0.0),
            max_tokens=1,
            stop_token_ids=(),
            reply_to="",
            arrival_s=0.0,
            deadline_s=float("inf"),
        )
        self._transfer = Transfer(request, kv, "", 0.0)

    def bring(self) -> float:
        """Bring it once; return the seconds from the offer to all of it being ours."""
        self._woken.clear()
        began_s = time.perf_counter()
        self._pulls.begin(self._transfer, WITHIN_S)
        if not self._woken.wait(WITHIN_S):
            raise SystemExit("it did not come")
        took_s = time.perf_counter() - began_s
        (pull,) = self._pulls.done()
        self._pulls.free(pull)
        if pull.failure:
            raise SystemExit(f"it did not come: {pull.failure}")
        return took_s


def speed_rows(receiver: Receiver, port: int, size: int, repeats: int) -> Iterator[Row]:
    """Yield how fast it comes, of runs of ours and of a bare socket in turn."""
    bare = memoryview(bytearray(size))
    receiver.bring()
    receive_bare(port, bare)  # the first to write there waits for the system's memory
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(repeats):
        ours.append(receiver.bring())
        began_s = time.perf_counter()
        receive_bare(port, bare)
        theirs.append(time.perf_counter() - began_s)
    row = Row(
        case=f"keys and values of a request, {size / 1e6:.0f} MB",
        unit="GB/s",
        ours=size / 1e9 / median(ours),
        peer="a bare socket, received only",
        peer_value=size / 1e9 / median(theirs),
    )
    yield measured(row, Aim("ratio_to_peer", 0.5, ">= 0.5 of a bare socket"))
    yield Row(case="the request stands still for", unit="ms", ours=1e3 * median(ours))


def steps_of(driver: Driver, others: Sequence[str], steps: int) -> list[float]:
    """Return what so many steps of the others took."""
    return [driver.decode(MODEL, *others) for _ in range(steps)]


def still_rows(driver: Driver, receiver: Receiver, steps: int) -> Iterator[Row]:
    """Yield how long the steps of others take beside KV that comes, and without."""
    others = [driver.submit(MODEL, OTHERS_TOKENS, 4 * steps + 8) for _ in range(OTHERS)]
    for one in others:
        driver.prefill(MODEL, one)
    steps_of(driver, others, 4)
    alone = steps_of(driver, others, steps)
    has_ended = threading.Event()

    def bring_on() -> None:
        while not has_ended.is_set():
            receiver.bring()

    thread = threading.Thread(target=bring_on)
    thread.start()
    try:
        beside = steps_of(driver, others, steps)
    finally:
        has_ended.set()
        thread.join(2 * WITHIN_S)
    for name, value in (("median", median), ("longest", max)):
        row = Row(
            case=f"{name} step of {OTHERS} others while keys and values come",
            unit="ms",
            ours=1e3 * value(beside),
            peer="while none come",
            peer_value=1e3 * value(alone),
        )
        yield measured(row, less_is_better=True)


class Sender:
    """The other node, a process; `close` ends it."""

    def __init__(self, shape: KvShape, tokens: int) -> None:
        """Start it with KV of so many tokens."""
        context = multiprocessing.get_context("spawn")
        near, far = context.Pipe()
        sizes = shape.layers, shape.kv_heads, shape.head_dim
        self._process = context.Process(target=serve, args=(sizes, tokens, far), daemon=True)
        self._process.start()
        if not near.poll(START_S):
            raise SystemExit("the sender does not start")
        address, name, token, self.port = near.recv()
        self.kv = KvHandle(
            owner=0,
            blocks=(),
            cached_tokens=tokens,
            kv_bytes=tokens * shape.token_bytes,
            shape=layout_of(shape),
            stream=KvStream(address, name, token),
        )

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.join()


def rows(tokens: int, repeats: int, steps: int) -> Iterator[Row]:
    """Yield all of them."""
    tokens = tokens // BLOCK_TOKENS * BLOCK_TOKENS
    with tempfile.TemporaryDirectory(prefix="aegaeon-kv-") as root:
        write_model(Path(root) / MODEL, WIDE_KV)
        spec = resolve(f"{MODEL}={Path(root) / MODEL}", root)
        (shape,) = kv_shapes((spec,), DTYPES[STORED]).values()
        size = tokens * shape.token_bytes
        settings = msgspec.structs.replace(
            Settings(),
            device="cpu",
            threads_per_instance=1,
            kv_budget_gb=(3 * size + (64 << 20)) / 1e9,
            model_cache_budget_gb=0.2,
        )
        sender = Sender(shape, tokens)
        try:
            with Driver(settings, (spec,)) as driver:
                exchange = driver.engine.exchange
                assert exchange is not None
                receiver = Receiver(exchange, sender.kv)
                progress(f"{size / 1e6:.0f} MB of keys and values over the loopback")
                yield from speed_rows(receiver, sender.port, size, repeats)
                driver.load(MODEL)
                driver.switch(MODEL)
                progress("others that decode meanwhile")
                yield from still_rows(driver, receiver, steps)
        finally:
            sender.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="little, to see that it runs")
    given = parser.parse_args(arguments)
    wanted = (64, 1, 8) if given.quick else (TOKENS, REPEATS, STEPS)
    publish("Keys and values between nodes", tuple(rows(*wanted)), given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
