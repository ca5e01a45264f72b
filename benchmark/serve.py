#!/usr/bin/env python3
"""Sends a load of requests for several models to an OpenAI-compatible server, on time, and says
what came of it: TTFT, TBT, what share kept its targets, tokens, failures, switches.

The server is the one at --base-url, else ours, started here with --copies names of one model; and
beside it, with --peer, other servers with the same weights, under the same load in turn.
"""

import argparse
import asyncio
import contextlib
import shlex
import sys
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Started by its path, Python looks beside this file and not in the root of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import msgspec
import uvloop
from tqdm import tqdm

from aegaeon.errors import AegaeonError
from aegaeon.metrics import Target
from aegaeon.models.references import locate
from aegaeon.proxy.worker import allow_connections
from aegaeon.sim.workloads import Arrival, Load
from benchmark.open_loop import send_on_time
from benchmark.report_rows import progress, publish
from benchmark.serve_load import Ask, add_load_flags, loads_of
from benchmark.serve_peers import PEERS, Weights
from benchmark.serve_rows import Run, rows_of, served_of, waits_of
from benchmark.serving import ServerError, running_server
from benchmark.stream_client import Exchange, StreamClient, StreamError

EPILOG = """\
examples:
  serve.py --base-url http://127.0.0.1:8080 --models a,b --rate 2
      two models of a server that runs, Poisson arrivals, 2 requests/s together
  serve.py --base-url https://api.example.com/v1 --api-key KEY --models big --dialect openai
      any OpenAI endpoint: only the standard's own fields are sent
  serve.py --models-dir models --rate 1,2,4 --zipf 1 --horizon-s 60 --json
      our server with six copies of SmolLM2, at three rates; the highest that 90 % are kept at
  serve.py --models-dir models --arrivals bursts --cv 4 --server-flags "--policy paper"
  serve.py --models-dir models --trace load.csv --horizon-s 120
      the requests of a file, at its times; its models become ours in turn
  serve.py --models-dir models --peer llama-server --gguf smollm2-bf16.gguf --peer transformers

Open loop: a request is sent when it is due, whether earlier ones have been answered or not, and its
times count from then. The generator says how late it was itself, how late its stamps may be, and
how many tokens/s its processor could have received: distrust results near that.
A request keeps its targets when it ended well, with its first token within --slo-ttft-s of the time
it was due and the mean time between its tokens within --slo-tbt-s; goodput is how many did, per
second. TTFT and TBT are of all requests that got tokens. Prompts are words, about one token each,
and begin differently. All models answer once before. What the proxy costs a token: relay.py."""

WARM_UP_S = 300.0  # for the first answer of all models: weights come from files


@dataclass(frozen=True)
class Server:
    """One that takes requests. `url` may end in /v1."""

    who: str
    url: str
    ask: Ask
    api_key: str | None = None


async def measure(
    server: Server, models: Sequence[str], rate: float, load: Load, options: argparse.Namespace
) -> Run:
    """Send `load` and return what came of it. Raises ServerError, StreamError."""
    exchanges = [
        Exchange(server.ask.path, server.ask.body(one, options.seed + number), one.at_s)
        for number, one in enumerate(load)
    ]
    async with StreamClient(server.url, server.api_key) as client:
        await _warm(client, server, models)
        before = await asyncio.to_thread(_switches, server.url)
        with tqdm(total=len(load), unit="request", desc=server.who, disable=None) as bar:
            punctuality = await send_on_time(
                client, exchanges, options.patience_s, lambda _: bar.update()
            )
        after = await asyncio.to_thread(_switches, server.url)
    return Run(
        who=server.who,
        rate=rate,
        horizon_s=options.horizon_s,
        served=served_of(load, exchanges),
        errors=Counter(one.error for one in exchanges if one.error is not None),
        waits=waits_of(exchanges),
        prompt_tokens=sum(one.prompt_tokens for one in exchanges),
        switches=None if before is None or after is None else after - before,
        punctuality=punctuality,
    )


async def _warm(client: StreamClient, server: Server, models: Sequence[str]) -> None:
    for number, model in enumerate(models):
        body = server.ask.body(Arrival(0.0, model, 8, 2), -1 - number)
        exchange = Exchange(server.ask.path, body, 0.0)
        try:
            await asyncio.wait_for(client.ask(exchange), WARM_UP_S)
        except asyncio.TimeoutError:
            exchange.error = f"no answer within {WARM_UP_S:.0f} s"
        if exchange.error is not None:
            raise ServerError(f"{server.who} does not serve {model!r}: {exchange.error}")


def _switches(url: str) -> int | None:
    """Return the switches so far where it is a server of ours, which says so; else None."""
    try:
        address = url.rstrip("/").removesuffix("/v1") + "/health"
        with urllib.request.urlopen(address, timeout=10.0) as answer:
            instances = msgspec.json.decode(answer.read())["instances"]
        return sum(int(one["switches"]) for one in instances)
    except (OSError, ValueError, KeyError, TypeError, msgspec.MsgspecError):
        return None


@contextlib.contextmanager
def started(who: str, options: argparse.Namespace, weights: Weights) -> Iterator[Server]:
    """Start a server, ours or a peer; what it logs is shown if it fails. Raises ServerError."""
    with tempfile.TemporaryFile("w+", prefix="aegaeon-serve-") as log:
        try:
            if who == "aegaeon":
                flags = [
                    f"--models={','.join(f'{n}={weights.checkpoint}' for n in weights.names)}",
                    f"--device={options.device}",
                    f"--slo-ttft-s={options.slo_ttft_s}",
                    f"--slo-tbt-s={options.slo_tbt_s}",
                    "--drain-s=2",
                    *shlex.split(options.server_flags),
                ]
                with running_server(flags, log) as url:
                    yield Server(who, url, Ask(options.chat, "vllm"))
                return
            flags = shlex.split(dict(options.peer_flags).get(who, ""))
            with (
                tempfile.TemporaryDirectory(prefix="aegaeon-serve-") as directory,
                PEERS[who].start(weights, Path(directory), flags, log) as url,
            ):
                yield Server(who, url, Ask(options.chat, PEERS[who].dialect))
        except ServerError:
            log.seek(0)
            sys.stderr.writelines(log.readlines()[-20:])
            raise


def run(options: argparse.Namespace) -> dict[str, list[Run]]:
    """Return the runs of each server, in alternation. Raises AegaeonError, ServerError."""
    names = options.models.split(",") if options.models else []
    if options.base_url:
        if not names:
            raise ServerError("--base-url needs --models A,B,C: what to ask for")
        ask = Ask(options.chat, options.dialect)
        server = Server(options.base_url, options.base_url, ask, options.api_key)
        loads = loads_of(options, names)
        runs = [
            uvloop.run(measure(server, names, rate, load, options))
            for _ in range(options.rounds)
            for rate, load in loads.items()
        ]
        return {server.who: runs}
    names = names or [f"model-{number:04d}" for number in range(options.copies)]
    checkpoint = locate(options.model, options.models_dir)
    if checkpoint is None:
        raise ServerError(f"no {options.model} in {options.models_dir}; run: make weights")
    weights = Weights(names, checkpoint, options.gguf)
    found: dict[str, list[Run]] = {who: [] for who in ("aegaeon", *options.peer)}
    for number in range(options.rounds):
        for rate, load in loads_of(options, names).items():
            for who, runs in found.items():
                progress(f"round {number + 1}: {who}, {rate:.3g} requests/s, {len(load)} requests")
                with started(who, options, weights) as server:
                    runs.append(uvloop.run(measure(server, names, rate, load, options)))
    return found


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    group = parser.add_argument_group("the server")
    add = group.add_argument
    add("--base-url", metavar="URL", help="one that runs, with /v1 or without")
    add("--api-key", metavar="KEY", help="sent to it as a bearer token")
    add("--models", metavar="A,B,C", help="what to ask for (default: the copies)")
    add("--chat", action="store_true", help="ask as a chat instead of by /v1/completions")
    add(
        "--dialect",
        choices=("vllm", "openai", "transformers"),
        default="vllm",
        help="fields beyond OpenAI's that --base-url takes; with vllm's answers get the length "
        "that is asked for, and tokens are counted exactly (default: vllm)",
    )
    add("--models-dir", type=Path, default=Path("models"), help="to serve from (default: models)")
    add("--model", default="SmolLM2-135M-Instruct", help="served as all copies")
    add("--copies", type=int, default=6, help="names of it (default: 6)")
    add("--device", default="cpu", help="of our server (default: cpu)")
    add("--server-flags", default="", help="further flags of our server, in quotes")
    peers = parser.add_argument_group("peers")
    add = peers.add_argument
    add("--peer", action="append", choices=tuple(PEERS), default=[], help="may be repeated")
    add("--gguf", metavar="FILE", type=Path, help="the model for llama-server")
    add("--peer-flags", nargs=2, metavar=("PEER", "FLAGS"), action="append", default=[])
    add_load_flags(parser)
    targets = parser.add_argument_group("targets and output")
    add = targets.add_argument
    add("--slo-ttft-s", type=float, default=5.0, help="promised first token (default: 5)")
    add("--slo-tbt-s", type=float, default=0.1, help="promised between tokens (default: 0.1)")
    add("--patience-s", type=float, default=120.0, help="after the last request (default: 120)")
    add("--rounds", type=int, default=1, help="of all, servers in turn (default: 1)")
    add("--json", action="store_true", help="print JSON instead of a table")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    options = make_parser().parse_args(arguments)
    allow_connections()
    try:
        ours, *peers = run(options).values()
    except (AegaeonError, ServerError, StreamError, OSError) as error:
        print(f"serve: error: {error}", file=sys.stderr)
        return 1
    target = Target(options.slo_ttft_s, options.slo_tbt_s)
    publish("Serving", rows_of(ours, peers, target), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
