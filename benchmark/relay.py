#!/usr/bin/env python3
"""What the proxy costs a token: how much later it reaches a client, and how many go through.

A real instance without a model makes the tokens of many streams at a pace and notes when each left
it; the real proxy process relays them over HTTP to a client in this process. In alternation with it
the same client is sent the same bytes by a process that knows them beforehand and only sends them
(what the proxy adds is what it takes longer), and by the peer, a bare FastAPI route.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Started by its path, Python looks beside this file and not in the root of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import msgspec
import uvloop

from aegaeon.config import Settings
from aegaeon.errors import AegaeonError
from aegaeon.instance.launch import Launch
from aegaeon.models.references import served_models
from aegaeon.proxy.launch import ProxyLaunch
from aegaeon.proxy.tokenizer import TextModel
from aegaeon.proxy.worker import allow_connections
from aegaeon.types import ModelSpec
from benchmark.open_loop import send_on_time
from benchmark.relay_instance import Orders
from benchmark.relay_peer import PeerOrders
from benchmark.relay_rows import PEER, Case, Relayed, Sample, relayed, rows_of
from benchmark.relay_sends import SendOrders
from benchmark.report_rows import Row, progress, publish
from benchmark.serving import ServerError, free_port, wait_for_port
from benchmark.stream_client import Exchange, StreamClient

EPILOG = """\
examples:
  relay.py --models-dir models
  relay.py --models-dir models --streams 50 --rounds 1 --json
Latency is from the token's record entering the proxy's mailbox until the client has its bytes (all
on one machine, one clock), over the time in which all streams are open; `in one batch`: the tokens
of all streams come at once, and the last one of them waits for all others to be sent. That takes
its time however they are made: the limit is bare sends, and `added` is what there is beyond them,
the median over the rounds. Processor time is that of the proxy process alone, all its threads. Two
processes besides this one compute: on fewer than three processors they get in each other's way."""

# Each token of it is text by itself: one that is half a character would go out with the next.
TEXT = (
    "The device is handed from model to model between tokens, so that many of them share it. A "
    'reader is promised a time to the first token and a time between tokens; what is "ahead" of '
    "its promise has time to spend, and the others may have it.\n"
)
START_S, STOP_S, PATIENCE_S = 60.0, 30.0, 120.0
SAMPLE_S = 0.05
MAX_BATCH = 16  # as servers have it by default
RECORD_STEP_S = 0.003  # slow enough for a frame a token


@dataclass(frozen=True)
class Setup:
    """Whose text side, how many streams, and tokens of each."""

    settings: Settings
    specs: tuple[ModelSpec, ...]
    token_ids: tuple[int, ...]
    streams: int
    directory: Path

    def file(self, name: str) -> Path:
        """A file for orders or stamps."""
        return self.directory / name


def make_setup(options: argparse.Namespace, case: Case, directory: Path) -> Setup:
    """Return the settings of a null server of as many names as `case` has groups. Raises
    AegaeonError."""
    port = free_port()
    settings = Settings(
        port=port,
        domain=f"relay-{os.getpid()}-{port}",
        models=tuple(f"m{number}={options.model}" for number in range(case.groups)),
        models_dir=str(options.models_dir),
        device="null",
        max_batch=-(-options.streams // case.groups),
        # No more than the pace, or some streams would end long before others.
        slo_ttft_s=0.5,
        slo_tbt_s=max(0.001, case.step_s * case.groups),
        log_level="warning",
    )
    specs = served_models(settings)
    token_ids = TextModel(specs[0].path).encode(TEXT)
    return Setup(settings, specs, token_ids, options.streams, directory)


def relay(setup: Setup, case: Case) -> Relayed:
    """Measure our proxy. Raises ServerError."""
    with _instance(setup, case) as instance, _proxy(setup) as proxy:
        url = f"http://127.0.0.1:{setup.settings.port}"
        # Tokenizers are read when a server starts, or a model is first asked for.
        short = Case(case.name, case.groups, case.step_s, 2)
        warm = [
            Exchange("/v1/completions", _body(setup, short, n), 0.0) for n in range(case.groups)
        ]
        exchanges, samples = uvloop.run(_stream(url, setup, case, proxy.pid, warm))
        assert instance.stdin is not None
        instance.stdin.close()
        instance.wait(STOP_S)
    return relayed(exchanges, samples, setup.file("stamps").read_bytes())


def recorded_frames(options: argparse.Namespace, case: Case) -> tuple[tuple[bytes, ...], str]:
    """Return the frames of one answer of our proxy and its id. Raises AegaeonError, ServerError."""
    with tempfile.TemporaryDirectory(prefix="aegaeon-relay-") as directory:
        setup = make_setup(options, case, Path(directory))
        one = Case(case.name, 1, RECORD_STEP_S, case.tokens)
        with _instance(setup, one), _proxy(setup):
            return _recorded(f"http://127.0.0.1:{setup.settings.port}", setup, case)


def relay_peer(setup: Setup, case: Case, frames: tuple[bytes, ...], name: str) -> Relayed:
    """Measure the peer on what our proxy sends. Raises ServerError."""
    port = free_port()
    orders = PeerOrders(
        frames=frames,
        name=name,
        groups=case.groups,
        step_s=case.step_s,
        port=port,
        stamps=str(setup.file("peer-stamps")),
    )
    setup.file("peer").write_bytes(msgspec.msgpack.encode(orders))
    with _process("benchmark.relay_peer", str(setup.file("peer"))) as peer:
        wait_for_port(peer, port)
        url = f"http://127.0.0.1:{port}"
        exchanges, samples = uvloop.run(_stream(url, setup, case, peer.pid))
        peer.send_signal(signal.SIGTERM)
        peer.wait(STOP_S)
    return relayed(exchanges, samples, setup.file("peer-stamps").read_bytes())


def relay_sends(setup: Setup, case: Case, frames: tuple[bytes, ...], name: str) -> Relayed:
    """Measure the sending alone of what our proxy sends. Raises ServerError."""
    port = free_port()
    orders = SendOrders(
        frames=frames,
        name=name,
        streams=setup.streams,
        groups=case.groups,
        step_s=case.step_s,
        port=port,
        stamps=str(setup.file("send-stamps")),
    )
    setup.file("sends").write_bytes(msgspec.msgpack.encode(orders))
    with _process("benchmark.relay_sends", str(setup.file("sends"))) as sending:
        wait_for_port(sending, port)
        url = f"http://127.0.0.1:{port}"
        exchanges, samples = uvloop.run(_stream(url, setup, case, sending.pid))
        sending.wait(STOP_S)
    return relayed(exchanges, samples, setup.file("send-stamps").read_bytes())


async def _stream(
    url: str, setup: Setup, case: Case, pid: int, warm: Sequence[Exchange] = ()
) -> tuple[list[Exchange], list[Sample]]:
    """Open all streams at once and read them to their ends."""
    exchanges = [
        Exchange("/v1/completions", _body(setup, case, number), 0.0)
        for number in range(setup.streams)
    ]
    samples: list[Sample] = []

    def look() -> None:
        samples.append(Sample(time.monotonic(), processor_s(pid)))

    async def sample() -> None:
        while True:
            look()
            await asyncio.sleep(SAMPLE_S)

    async with StreamClient(url, reads_at_end=True) as client:
        await send_on_time(client, warm, PATIENCE_S)
        sampling = asyncio.create_task(sample())
        await send_on_time(client, exchanges, PATIENCE_S)
        look()
        sampling.cancel()
    for one in exchanges:
        if one.error is None and len(one.token_times_s) != case.tokens:
            one.error = f"{len(one.token_times_s)} tokens of {case.tokens}"
    failed = [one.error for one in exchanges if one.error is not None]
    if failed:
        raise ServerError(f"{len(failed)} of {len(exchanges)} streams failed: {failed[0]}")
    return exchanges, samples


def _body(setup: Setup, case: Case, number: int) -> bytes:
    return msgspec.json.encode(
        {
            "model": setup.specs[number % len(setup.specs)].id,
            "prompt": f"{number}",
            "max_tokens": case.tokens,
            "ignore_eos": True,
            "stream": True,
            # Counts the tokens where a frame has several.
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
    )


def _recorded(url: str, setup: Setup, case: Case) -> tuple[tuple[bytes, ...], str]:
    """Return the frames of one answer and its id."""
    request = urllib.request.Request(
        f"{url}/v1/completions", _body(setup, case, 0), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        frames = answer.read().split(b"\n\n")
    kept = [frame + b"\n\n" for frame in frames if frame.startswith(b"data: {")]
    return tuple(kept), msgspec.json.decode(kept[0][6:])["id"]


@contextlib.contextmanager
def _instance(setup: Setup, case: Case) -> "Iterator[subprocess.Popen[bytes]]":
    launch = Launch(
        settings=setup.settings,
        specs=setup.specs,
        instance="instance-0",
        index=0,
        incarnation=1,
        status_fd=-1,
        parent_pid=os.getpid(),
    )
    orders = Orders(
        launch=launch,
        step_s=case.step_s,
        token_ids=setup.token_ids,
        stamps=str(setup.file("stamps")),
    )
    setup.file("instance").write_bytes(msgspec.json.encode(orders))
    with _process("benchmark.relay_instance", str(setup.file("instance"))) as process:
        assert process.stdout is not None
        if process.stdout.readline() != b"up\n":
            raise ServerError("the null instance did not start")
        yield process


@contextlib.contextmanager
def _proxy(setup: Setup) -> "Iterator[subprocess.Popen[bytes]]":
    reading, writing = os.pipe()
    launch = ProxyLaunch(
        settings=setup.settings,
        specs=setup.specs,
        address="proxy.1",
        status_fd=writing,
        parent_pid=os.getpid(),
    )
    try:
        with _process("aegaeon.proxy.worker", inherited=writing) as process:
            assert process.stdin is not None
            process.stdin.write(msgspec.json.encode(launch))
            process.stdin.close()
            wait_for_port(process, setup.settings.port)
            yield process
    finally:
        os.close(reading)
        os.close(writing)


@contextlib.contextmanager
def _process(
    module: str, *arguments: str, inherited: int | None = None
) -> "Iterator[subprocess.Popen[bytes]]":
    """Run a module of the repository; it is ended at the end, in order where it can."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=Path(__file__).resolve().parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE if inherited is None else None,
        pass_fds=() if inherited is None else (inherited,),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_S)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def processor_s(pid: int) -> float:
    """Return the processor time that a process has had, all threads."""
    total = 0
    for file in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):
            total += int(file.read_text().split()[0])
    return total / 1e9


def cases_of(options: argparse.Namespace) -> dict[str, Case]:
    """Return the cases by their names in --cases."""
    step_s = 1 / options.tokens_per_s
    groups = -(-options.streams // MAX_BATCH)
    turns = f"in batches of {MAX_BATCH}, {groups} models"
    return {
        "batch": Case("in one batch", 1, step_s, options.tokens),
        "turns": Case(turns, groups, step_s / groups, options.tokens),
        "full": Case("as fast as tokens are made", 1, 0.0, 4 * options.tokens),
    }


def run(options: argparse.Namespace) -> list[Row]:
    """Measure all cases, ours and the peer in alternation. Raises AegaeonError, ServerError."""
    rows = []
    cases = cases_of(options)
    unknown = set(options.cases.split(",")) - set(cases)
    if unknown:
        raise ServerError(f"no case {min(unknown)!r}; there are: {', '.join(cases)}")
    for case in [cases[name] for name in options.cases.split(",")]:
        ours, peers, sends = [], [], []
        frames, name = recorded_frames(options, case)
        for number in range(options.rounds):
            with tempfile.TemporaryDirectory(prefix="aegaeon-relay-") as directory:
                setup = make_setup(options, case, Path(directory))
                progress(f"round {number + 1}: {case.name}")
                ours.append(relay(setup, case))
                if case.step_s > 0:
                    progress(f"round {number + 1}: {case.name}, bare sends")
                    sends.append(relay_sends(setup, case, frames, name))
                if not options.no_peer:
                    progress(f"round {number + 1}: {case.name}, {PEER}")
                    peers.append(relay_peer(setup, case, frames, name))
        rows += rows_of(case, options.streams, ours, peers, sends)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models-dir", type=Path, default=Path("models"), help="(default: %(default)s)")
    add("--model", default="SmolLM2-135M-Instruct", help="whose tokenizer (default: %(default)s)")
    add("--streams", type=int, default=200, help="at once (default: %(default)s)")
    add("--tokens-per-s", type=float, default=20.0, help="of a stream (default: %(default)s)")
    add("--tokens", type=int, default=160, help="of a stream (default: %(default)s)")
    add("--rounds", type=int, default=3, help="of each, in alternation (default: %(default)s)")
    add("--cases", default="batch,turns,full", help="which (default: %(default)s)")
    add("--no-peer", action="store_true", help="ours alone")
    add("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    allow_connections()
    try:
        rows = run(options)
    except (AegaeonError, ServerError, OSError) as error:
        print(f"relay: error: {error}", file=sys.stderr)
        return 1
    publish("Relay", rows, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
