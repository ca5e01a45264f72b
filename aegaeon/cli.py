"""The command line: flags become settings, commands call what does the work; nothing else is here.

The only module that prints. An error of ours is one line on stderr and an exit code.
"""

import argparse
import json
import os
import select
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import msgspec
from rich.console import Console, RenderableType
from rich.live import Live

from aegaeon import __version__, _native
from aegaeon.cluster.serve import ClusterServer
from aegaeon.config import Settings, config_path, describe, load_settings
from aegaeon.config_command import config_command
from aegaeon.device.processors import compute_threads
from aegaeon.errors import AegaeonError, ConfigError, ModelNotFound
from aegaeon.explain import explain_command
from aegaeon.flags import Parser, add_setting
from aegaeon.keys import keys_command
from aegaeon.logs import set_up
from aegaeon.memory.budget import lay_out
from aegaeon.memory.machine import measure_copy, measure_disk, read_machine, with_device
from aegaeon.memory.plan import Probes, make_plan
from aegaeon.memory.room import choose_layout
from aegaeon.models.references import locate, served_models, split_reference
from aegaeon.models_command import models_command
from aegaeon.plan import layout_lines, plan_tables
from aegaeon.plan_day import plan_day_command
from aegaeon.plan_devices import plan_devices_command
from aegaeon.ports import free_port
from aegaeon.proxy.keys import read_keys
from aegaeon.proxy.tracing import check_tracing
from aegaeon.reload import Reloader
from aegaeon.simulate import simulate_command
from aegaeon.status_command import status_command
from aegaeon.store.domains import removable_files
from aegaeon.supervisor import Supervisor
from aegaeon.top import top_command
from aegaeon.types import ModelSpec

COMMANDS = (
    *("serve", "plan", "simulate", "config", "explain", "top", "status"),
    *("keys", "models", "instances"),
)
EXIT_FAILED = 1
EXIT_USAGE = 2
PIPED_COLUMNS = 120

GROUPS = {
    "where it listens": ("host", "port", "keys_file", "max_body_bytes"),
    "what it serves": ("models", "models_dir", "preload_models", "preload_per_instance"),
    "instances": (
        *("colocated_count", "prefill_count", "decode_count", "device"),
        *("threads_per_instance", "instruction_set", "quantize", "kv_dtype"),
        "activation_dtype",
    ),
    "bytes": ("model_cache_budget_gb", "kv_budget_gb", "device_memory_gb", "link_gb_per_s"),
    "scheduling": (
        *("policy", "slo_ttft_s", "slo_tbt_s", "costs_file"),
        *("max_batch", "max_waiting", "max_open", "max_open_mb", "request_timeout_s"),
    ),
    "node": (
        "domain",
        "cluster",
        "metadata_backend",
        "redis_url",
        "lease_s",
        "watchdog_s",
        "drain_s",
        "trace_endpoint",
        "log_level",
    ),
}

OVERVIEW = """\
Serves many language models on few devices: the device passes from model to model between tokens.

commands:
  aegaeon serve              serve models over an OpenAI-compatible HTTP interface (the default)
  aegaeon plan [CONFIG]      show what fits where and how long switches take, without serving
  aegaeon plan --costs FILE  find how many devices a load needs
  aegaeon plan --trace FILE  plan a day of many models on many nodes
  aegaeon explain ID         tell why a request was served as it was
  aegaeon top                show what a running server does, live
  aegaeon status             show a running server's nodes, instances and models
  aegaeon simulate           serve a load on devices that are not there, under any policy
  aegaeon config check FILE  say what is wrong with a configuration file (also: schema)
  aegaeon keys create NAME   let only clients with a key in (also: list, revoke)
  aegaeon models add NAME    have a running server serve one more (also: remove, load, pin)
  aegaeon models list        show the models of the models directory
  aegaeon models import FILE turn a GGUF file into a model directory
  aegaeon models pull ID     download a model from the hub (also: fetch, share, from node to node)

`aegaeon serve --help` explains every setting; `python -m aegaeon` is the same as `aegaeon`."""

EXAMPLES = """\
examples:
  aegaeon serve --models SmolLM2-135M
  aegaeon serve --models chat=~/models/Qwen3-0.6B,code=Qwen/Qwen2.5-Coder-0.5B --colocated-count 2
  python -m aegaeon --host 0.0.0.0 --port 8080 --models a,b,c --model-cache-budget-gb 4
  aegaeon serve --config server.toml      # the same names, e.g.  models = ["a", "b"]
  AEGAEON_PORT=9000 aegaeon serve --models a

Models, keys and bounds follow the file while it serves (or kill -HUP), the rest needs a restart.
Flags win over AEGAEON_* variables, those over the file. Try it:
  curl -N localhost:8080/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "a", "stream": true, "messages": [{"role": "user", "content": "Hello"}]}'
exit codes: 0 stopped in order, 1 could not start or was killed, 2 wrong usage or settings"""


PLAN_EXAMPLES = """\
examples:
  aegaeon plan --models SmolLM2-135M
  aegaeon plan server.toml --device staged --device-memory-gb 4
  aegaeon plan server.toml --json | jq '.models[].cold_switch_s'
  aegaeon plan --costs h100.json --rates 80x0.1 --lengths load.csv   # how many devices?

Takes every setting of `aegaeon serve`; those of listening and scheduling change nothing here.
With --costs it finds how many devices a load needs: `aegaeon plan --costs FILE --help`.
With --trace it plans a day of many models on many nodes: `aegaeon plan --trace FILE --help`.
exit codes: 0 it fits, 1 it does not fit or a model is missing, 2 wrong usage or settings"""

# Commands that only say something.
SPEAKING: dict[str, Callable[[Sequence[str]], Iterable[RenderableType]]] = {
    "config": config_command,
    "explain": explain_command,
    "keys": keys_command,
    "models": models_command,
    "simulate": simulate_command,
    "status": status_command,
}
# Of a command: what it does, and examples.
WORDS = {
    "serve": ("Serve models over an OpenAI-compatible HTTP interface.", EXAMPLES),
    "plan": (
        "Show what fits where and how long switches take; nothing is started or downloaded.",
        PLAN_EXAMPLES,
    ),
    "instances": ("Run instances without a proxy, which runs elsewhere.", ""),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(given)
    except ConfigError as error:
        code = EXIT_USAGE
        message = str(error)
    except AegaeonError as error:
        code = EXIT_FAILED
        message = str(error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `aegaeon models list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    print(f"aegaeon: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _run(given: list[str]) -> int:
    if given in (["-h"], ["--help"]):
        print(OVERVIEW)
        return 0
    if given == ["--version"]:
        print(f"aegaeon {__version__}")
        return 0
    command, rest = split_command(given)
    if command == "top":
        return _top(rest)
    if command in SPEAKING:
        return _show(SPEAKING[command](rest))
    if command == "plan" and any(word.partition("=")[0] == "--trace" for word in rest):
        return _show(plan_day_command(rest))
    if command == "plan" and any(word.partition("=")[0] == "--costs" for word in rest):
        return _show(plan_devices_command(rest))
    options = vars(serve_parser(command).parse_args(rest))
    config_file = options.pop("config", None)
    if command == "plan":
        as_json, file = options.pop("json", False), options.pop("file", config_file)
        if config_file not in (None, file):
            raise ConfigError(f"both {file} and --config {config_file} are given; name one file")
        _plan(load_settings(options, config_file=file), as_json)
        return 0
    owner = _owner_of(options.pop("owner")) if "owner" in options else None
    load = partial(load_settings, options, config_file=config_file)
    if command == "serve" and (settings := load()).clustered is not None:
        return _serve_cluster(settings)
    return _serve(load, config_path(config_file), command == "serve", owner)


def _owner_of(pid: int) -> int:
    """Return what tells, as a descriptor, when that process has ended. Raises ConfigError."""
    try:
        return os.pidfd_open(pid)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--owner {pid} is no process that runs ({error})") from None


def split_command(given: Sequence[str]) -> tuple[str, list[str]]:
    """Find the command among flags before and after it; `serve` when there is none.

    Raises ConfigError on a word that is neither a command nor a flag's value.
    """
    rest = list(given)
    index = 0
    while index < len(rest):
        word = rest[index]
        if not word.startswith("-"):
            break
        takes_value = _takes_value(word.partition("=")[0])
        index += 2 if takes_value and "=" not in word else 1
    if index >= len(rest):
        return "serve", rest
    command = rest.pop(index)
    if command not in COMMANDS:
        raise ConfigError(f"unknown command {command!r}; see `aegaeon --help`")
    return command, rest


def _takes_value(flag: str) -> bool:
    name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
    if name in {field.name for field in msgspec.structs.fields(Settings)}:
        return describe(name)[0] is not bool
    if flag in ("-h", "--help"):
        return False
    if flag == "--config":
        return True
    raise ConfigError(f"unrecognized arguments: {flag}; see `aegaeon serve --help`")


def serve_parser(command: str) -> argparse.ArgumentParser:
    """A flag for every setting; only those given appear in the result."""
    description, examples = WORDS[command]
    parser = Parser(
        prog=f"aegaeon {command}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="settings as TOML or YAML (also: AEGAEON_CONFIG)"
    )
    if command == "instances":
        text = "process with which they end (default: the one that starts them)"
        parser.add_argument("--owner", metavar="PID", type=int, help=text)
    if command == "plan":
        parser.add_argument("file", metavar="CONFIG", nargs="?", help="the same as --config")
        parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    grouped = {name for names in GROUPS.values() for name in names}
    others = [f.name for f in msgspec.structs.fields(Settings) if f.name not in grouped]
    for title, names in {**GROUPS, "other": others}.items():
        if names:
            group = parser.add_argument_group(title)
            for name in names:
                add_setting(group, name)
    return parser


def _serve(
    load: Callable[[], Settings], file: Path | None, with_proxy: bool, owner: int | None
) -> int:
    settings = loaded = load()
    set_up(settings.log_level, "supervisor", settings.log_format)
    if not with_proxy and owner is None:
        _native.die_with_parent(signal.SIGTERM)
    if with_proxy and settings.port == 0:
        settings = msgspec.structs.replace(settings, port=free_port(settings.host))
    if settings.keys_file:
        read_keys(Path(settings.keys_file).expanduser())
    check_tracing(settings)
    specs = served_models(settings)
    supervisor = Supervisor(settings, specs, with_proxy)
    reloader = Reloader(file, load, loaded, supervisor, specs)
    parent = os.getppid()

    def on_signal(number: int, _: object) -> None:
        if number == signal.SIGHUP and reloader.has_file:
            reloader.ask()
            return
        # A second signal, or the end of the server we are part of: at once.
        is_orphan = not with_proxy and os.getppid() != parent
        supervisor.ask_stop(at_once=is_orphan or supervisor.is_stopping)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, on_signal)
    try:
        supervisor.start()
        if with_proxy:
            _print_banner(supervisor.settings, specs)
        ready_line = f"ready on http://{settings.host}:{settings.port}" if with_proxy else ""
        _wait(supervisor, reloader, ready_line, owner)
    finally:
        supervisor.stop()
    if supervisor.failure is not None:
        print(f"aegaeon: error: {supervisor.failure}", file=sys.stderr)
    return EXIT_FAILED if supervisor.failure or supervisor.is_killed else 0


def _serve_cluster(settings: Settings) -> int:
    """Serve on a cluster; what the flags say holds for each of its nodes."""
    set_up(settings.log_level, "cluster", settings.log_format)
    check_tracing(settings)
    server = ClusterServer(settings)
    try:
        server.start()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: server.ask_stop())
        print(f"aegaeon {__version__} serves on the cluster {server.name}", flush=True)
        server.run(lambda urls: print(f"ready on {', '.join(urls)}", flush=True))
    finally:
        server.close()
    return EXIT_FAILED if server.is_killed else 0


def _wait(supervisor: Supervisor, reloader: Reloader, ready_line: str, owner: int | None) -> None:
    """Return when the server has ended, as it has to with its owner; say once that it is ready."""
    is_said = not ready_line
    while not supervisor.wait_ended(timeout_s=0.2 if not is_said else 1.0):
        if supervisor.is_ready and not is_said:
            print(ready_line, flush=True)
            is_said = True
        if owner is not None and select.select([owner], [], [], 0)[0]:
            supervisor.ask_stop()
        if supervisor.is_ready and not supervisor.is_stopping:
            reloader.look()


def _print_banner(settings: Settings, specs: Sequence[ModelSpec]) -> None:
    print(f"aegaeon {__version__} listens on http://{settings.host}:{settings.port}")
    for spec in specs:
        print(
            f"  model {spec.id}: {spec.architecture}, {spec.weight_bytes / 1e9:.2f} GB"
            f"{'' if spec.quantize == 'none' else f' in {spec.quantize}'}, "
            f"context {spec.context_tokens} tokens"
        )
    line = f"  {settings.instance_count} instance(s) on {settings.device}"
    if settings.device != "null":
        is_shared = settings.instance_count > 1 and not settings.threads_per_instance
        line += f", {'sharing' if is_shared else 'each with'} {compute_threads(settings)} thread(s)"
    print(line, flush=True)
    if settings.device != "null":
        for row in layout_lines(lay_out(settings, specs, read_machine())):
            print(f"    {row}", flush=True)


def _plan(settings: Settings, as_json: bool) -> None:
    """Print what `serve` would do with memory. Downloads, starts and leaves nothing."""
    if settings.device == "null":
        raise ConfigError("the null device holds no bytes; plan for another --device")
    for reference in settings.models:
        target = split_reference(reference if isinstance(reference, str) else reference.reference)[
            1
        ]
        if locate(target, settings.models_dir) is None:
            raise ModelNotFound(f"{target} is not here; run `aegaeon models pull {target}` first")
    specs = served_models(settings)
    machine = with_device(read_machine(removable_files(settings)), settings)
    settings, node = choose_layout(settings, specs, machine)
    plan = make_plan(settings, specs, node, machine, Probes(measure_disk, measure_copy))
    if as_json:
        print(json.dumps(msgspec.to_builtins(plan), indent=2))
        return
    _show(plan_tables(plan))


def _show(parts: Iterable[RenderableType]) -> int:
    """Print what a command says: tables for people, lines as they are."""
    console = Console(width=None if sys.stdout.isatty() else PIPED_COLUMNS)
    for part in parts:
        if isinstance(part, str):
            print(part, flush=True)
        else:
            console.print(part, highlight=False)
    return 0


def _top(given: Sequence[str]) -> int:
    """Show what goes on: once, or in place of itself until it is interrupted."""
    frames, is_live = top_command(given)
    if not is_live:
        return _show(frames)
    with Live(console=Console(), screen=sys.stdout.isatty(), auto_refresh=False) as live:
        for frame in frames:
            live.update(frame, refresh=True)
    return 0
