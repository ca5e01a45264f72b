#!/usr/bin/env python3
"""Offline benchmark of colocation: requests to many models, all at once, on few instances.

Without HTTP: a supervisor, a gateway, and the tokens as they come. JSON on stdout, the rest on
stderr.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

import msgspec
from tqdm import tqdm

# Started by its path, Python looks beside this file and not in the root of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aegaeon.config import Settings, check_settings
from aegaeon.device.processors import compute_threads
from aegaeon.errors import AegaeonError, ConfigError, ContextLengthExceeded
from aegaeon.memory.budget import GB
from aegaeon.metrics import time_to_first_token_s
from aegaeon.models.references import served_models
from aegaeon.proxy.gateway import Gateway
from aegaeon.proxy.generation import Generation
from aegaeon.proxy.tokenizer import TextModel
from aegaeon.sampling import SamplingParams
from aegaeon.store.domains import open_domain
from aegaeon.store.names import SHARED_MEMORY, WEIGHTS, region_path
from aegaeon.supervisor import Supervisor
from aegaeon.types import Instance, InstanceId, ModelSpec
from aegaeon.workload import MixPolicy, make_prompt, mix_models
from benchmark.offline_report import (
    Activity,
    Memory,
    Served,
    activity_between,
    describe_machine,
    make_report,
)

START_S = 600.0  # for instances to come up, with everything that is preloaded
SETTLE_S = 5.0  # for instances to publish that they are done
SAMPLE_S = 0.02  # between looks at the weights in memory

EPILOG = """\
All requests arrive at once, in the order of the mix; TTFT counts from there and contains waiting,
loading and switching. End-of-text tokens are ignored: N requests of T tokens are N * T tokens.
examples:
  offline_qwen3_colocation.py --models Qwen/Qwen3-0.6B,Qwen/Qwen3-1.7B --local-root models
  offline_qwen3_colocation.py --models a=models/X,b=models/X --model-mix-policy grouped
exit codes: 0 all requests served, 1 some failed or nothing could start, 2 wrong settings"""


def make_parser() -> argparse.ArgumentParser:
    """Return the flags; their names are an interface that scripts rely on."""
    parser = argparse.ArgumentParser(
        description="Serve a fixed load over several models and report TTFT, TBT and switches.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    models = parser.add_argument_group("models")
    models.add_argument("--model", metavar="REF", help="one model, before those of --models")
    models.add_argument("--models", default="", metavar="REF,REF", help="models of the mix")
    models.add_argument(
        *("--local-root", "--models-dir"),
        dest="models_dir",
        default=Settings().models_dir,
        metavar="DIR",
        help="where predownloaded and imported models are (default: %(default)s)",
    )
    models.add_argument(
        "--preload-models", action="store_true", help="load models before the clock starts"
    )
    models.add_argument(
        "--preload-per-instance",
        type=int,
        default=0,
        metavar="N",
        help="models that each instance loads before the clock starts, the next instance going on "
        "where this one ended (default: 0, with --preload-models as many as fit)",
    )
    _add_load_flags(parser.add_argument_group("load"))
    _add_node_flags(parser.add_argument_group("node"))
    add("--trace-json", metavar="FILE", help="also write one record per request")
    add("--out-json", metavar="FILE", help="also write the JSON of stdout there")
    return parser


def _add_load_flags(group: "argparse._ArgumentGroup") -> None:
    add = group.add_argument
    add(
        "--model-mix-policy",
        choices=get_args(MixPolicy),
        default="round_robin",
        help="round_robin: another model with every request, most switching; grouped: bursts; "
        "random: drawn by --seed (default: %(default)s)",
    )
    add("--group-size", type=int, default=4, help="requests of a burst (default: %(default)s)")
    add("--num-requests", type=int, default=12, help="requests in all (default: %(default)s)")
    add("--prompt-chars", type=int, default=256, help="characters each (default: %(default)s)")
    add("--max-new-tokens", type=int, default=64, help="tokens each (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the mix and the prompts (default: %(default)s)")


def _add_node_flags(group: "argparse._ArgumentGroup") -> None:
    add, default = group.add_argument, Settings()
    for role, count in (("colocated", 1), ("prefill", 0), ("decode", 0)):
        add(f"--{role}-count", type=int, default=count, help="instances (default: %(default)s)")
    add(
        "--model-cache-budget-gb", type=float, default=0.0, help="weights of an instance; 0: chosen"
    )
    add("--quantize", default=default.quantize, help="none, int8 (default: %(default)s)")
    add("--threads-per-instance", type=int, default=0, help="0: processors shared out")
    add("--metadata-backend", choices=("shared_memory", "redis"), default="shared_memory")
    add("--redis-url", default=default.redis_url, help="(default: %(default)s)")
    add("--device", default=default.device, help="(default: %(default)s)")
    add("--log-level", default="warning", help="(default: %(default)s)")


def settings_of(options: argparse.Namespace) -> Settings:
    """Return the settings of the node. Raises ConfigError."""
    if options.num_requests < 1 or options.max_new_tokens < 1 or options.prompt_chars < 1:
        raise ConfigError("--num-requests, --max-new-tokens and --prompt-chars must be at least 1")
    named = [options.model or "", *options.models.split(",")]
    models = list(dict.fromkeys(name.strip() for name in named if name.strip()))
    if not models:
        raise ConfigError("name the models: --models A,B,C (`aegaeon models list` shows them)")
    same = (
        *("models_dir", "colocated_count", "prefill_count", "decode_count"),
        *("model_cache_budget_gb", "threads_per_instance"),
        *("metadata_backend", "redis_url", "device", "log_level", "preload_per_instance"),
        "quantize",
    )
    values: dict[str, Any] = {name: getattr(options, name) for name in same}
    return check_settings(
        values
        | {
            "models": models,
            "domain": f"offline-{os.getpid()}",
            "preload_models": options.preload_models or options.preload_per_instance > 0,
            "max_waiting": max(1024, options.num_requests),
            # A load may be any size; each request still ends.
            "request_timeout_s": 24 * 3600.0,
            "drain_s": 1.0,
        }
    )


def check_outputs(options: argparse.Namespace) -> None:
    """Raise ConfigError when results could not be written; better now than after the run."""
    for name in filter(None, (options.out_json, options.trace_json)):
        try:
            Path(name).touch()
        except OSError as error:
            raise ConfigError(f"cannot write {name} ({error.strerror}); name another") from None


def make_load(options: argparse.Namespace, specs: Sequence[ModelSpec]) -> tuple[Generation, ...]:
    """Return the requests in order of arrival. Raises ContextLengthExceeded and what reading a
    tokenizer raises."""
    texts = {spec.id: TextModel(spec.path) for spec in specs}
    contexts = {spec.id: spec.context_tokens for spec in specs}
    order = mix_models(
        *(list(texts), options.num_requests, options.model_mix_policy),
        group_size=options.group_size,
        seed=options.seed,
    )
    load = []
    for index, model in enumerate(order):
        prompt = texts[model].encode(make_prompt(options.prompt_chars, options.seed + index))
        if len(prompt) + options.max_new_tokens > contexts[model]:
            raise ContextLengthExceeded(
                f"{len(prompt)} prompt tokens and {options.max_new_tokens} new ones exceed the "
                f"{contexts[model]} of {model}; lower --prompt-chars or --max-new-tokens"
            )
        load.append(
            Generation(
                model=model,
                prompt_token_ids=prompt,
                sampling=SamplingParams(temperature=0.0),
                max_tokens=options.max_new_tokens,
            )
        )
    return tuple(load)


async def serve_one(
    gateway: Gateway, generation: Generation, began_s: float, bar: "tqdm[NoReturn]"
) -> Served:
    """Send one request and note when its tokens come."""
    arrival_s = time.monotonic() - began_s
    times: list[float] = []
    instance, error = "", None

    def note() -> None:
        nonlocal instance
        delta = opened.take()
        assert delta is not None, "told of tokens"
        times.extend([delta.received_s - began_s] * len(delta.token_ids))
        instance = delta.instance
        bar.update(len(delta.token_ids))

    try:
        opened = gateway.open(generation, note)
        await gateway.keep(opened)
    except AegaeonError as failure:
        error = f"{failure.code}: {failure}"
    return Served(
        model=generation.model,
        instance=instance,
        arrival_s=arrival_s,
        ttft_s=time_to_first_token_s(arrival_s, times),
        token_times_s=tuple(times),
        prompt_tokens=len(generation.prompt_token_ids),
        error=error,
    )


async def serve_load(
    settings: Settings, specs: tuple[ModelSpec, ...], load: Sequence[Generation]
) -> tuple[list[Served], float, dict[InstanceId, Activity]]:
    """Serve `load` on running instances; return its requests, wall seconds, and what each instance
    did meanwhile."""
    domain = open_domain(settings)
    gateway = Gateway(domain, settings, specs)
    try:
        await gateway.start()
        before = {row.record.id: row for row in gateway.instances()}
        tokens = sum(generation.max_tokens for generation in load)
        with tqdm(total=tokens, unit="token", file=sys.stderr, dynamic_ncols=True) as bar:
            began_s = time.monotonic()
            served = await asyncio.gather(
                *(serve_one(gateway, generation, began_s, bar) for generation in load)
            )
            wall_s = time.monotonic() - began_s
        after = await _settled(gateway)
        return served, wall_s, activity_between(before, after)
    finally:
        await gateway.close()
        domain.close()


async def _settled(gateway: Gateway) -> tuple[Instance, ...]:
    """The instances once they have published that nothing runs any more."""
    give_up_s = time.monotonic() + SETTLE_S
    # The view may be older than the last token: look at one made from now on.
    await asyncio.sleep(0.5)
    while time.monotonic() < give_up_s:
        rows = gateway.instances()
        if not any(sum(row.status.running.values()) for row in rows):
            break
        await asyncio.sleep(0.05)
    return gateway.instances()


class ResidentWeights:
    """Watches how much memory the weights of a node really take, from a thread of its own."""

    def __init__(self, domain: str) -> None:
        """Start it."""
        self._cache = region_path(SHARED_MEMORY, domain, WEIGHTS)
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="resident weights")
        self.peak_bytes = 0

    def __enter__(self) -> "ResidentWeights":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._has_ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._has_ended.wait(SAMPLE_S):
            self.peak_bytes = max(self.peak_bytes, self._resident_bytes())

    def _resident_bytes(self) -> int:
        """Bytes of the cache's data files, not of its directory."""
        resident = 0
        for path in self._cache.parent.glob(f"{self._cache.name}+*"):
            with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
                resident += 512 * path.stat().st_blocks
        return resident


def run(options: argparse.Namespace) -> int:
    """Run the benchmark and print its JSON; returns the exit code."""
    settings = settings_of(options)
    check_outputs(options)
    logging.basicConfig(level=settings.log_level.upper(), stream=sys.stderr)
    specs = served_models(settings)
    load = make_load(options, specs)
    with Supervisor(settings, specs) as supervisor:
        supervisor.wait_ready(START_S)
        settings = supervisor.settings
        with ResidentWeights(settings.domain_name) as weights:
            served, wall_s, activity = asyncio.run(serve_load(settings, specs, load))
    told = vars(options) | {"threads_per_instance": compute_threads(settings)}
    report = make_report(
        *(served, wall_s, activity),
        device=settings.device,
        machine=describe_machine(),
        memory=Memory(weights.peak_bytes, round(settings.model_cache_budget_gb * GB)),
        options=told,
    )
    text = msgspec.json.format(msgspec.json.encode(report), indent=2)
    sys.stdout.buffer.write(text + b"\n")
    if options.out_json:
        Path(options.out_json).write_bytes(text + b"\n")
    if options.trace_json:
        Path(options.trace_json).write_bytes(msgspec.json.encode(served) + b"\n")
    errors = [one.error for one in served if one.error is not None]
    if errors:
        print(f"error: {len(errors)} of {len(served)} failed: {errors[0]}", file=sys.stderr)
    return 1 if errors else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    try:
        return run(make_parser().parse_args(arguments))
    except AegaeonError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    # As Ctrl-C, so that what was started is stopped; here, since it is the process's to decide.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
