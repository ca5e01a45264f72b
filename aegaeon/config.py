"""The settings tree: defaults, over them a TOML or YAML file, over it AEGAEON_*, over it flags.

The only reader of the environment. Unknown keys fail; every field is documented once, here, and
becomes a flag, an environment variable and a file key of the same name.
"""

import math
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
import yaml
from msgspec import Meta

from aegaeon.errors import ConfigError
from aegaeon.nodes import ClusterSettings
from aegaeon.setting_text import parse_text
from aegaeon.specs import ModelSettings as ModelSettings  # noqa: PLC0414  one of the settings
from aegaeon.specs import doc as _doc
from aegaeon.types import Quantize, Role

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PREFIX = "AEGAEON_"
# A switch there moves nothing, and two steps side by side keep the processors busier than one after
# the other on all of them: measured with benchmark/serve.py.
COLOCATED_ON_CPU = 2
# Read by the build, by commands that ask a server, or naming the file itself; not settings.
NOT_SETTINGS = frozenset({"AEGAEON_API_KEY", "AEGAEON_CONFIG", "AEGAEON_CUDA", "AEGAEON_SANITIZE"})

StoredKv = Literal["float32", "bfloat16", "float16"]
KvDtype = Literal["auto", StoredKv]
Activations = Literal["float32", "bfloat16"]
ActivationDtype = Literal["auto", Activations]

DEVICE = re.compile(r"cpu|staged|null|cuda:(?P<number>[0-9]{1,3})")
# It becomes part of file names and keys.
DOMAIN = re.compile(r"([A-Za-z0-9_-][A-Za-z0-9._-]{0,99})?")


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of a server. Units stand in the names; 0 often means "choose for me"."""

    host: Annotated[str, _doc("address to listen on")] = "127.0.0.1"
    port: Annotated[int, _doc("port to listen on", ge=0, le=65535)] = 8080
    keys_file: Annotated[
        str,
        _doc("keys that let clients in, from `aegaeon keys create` (default: no key is asked for)"),
    ] = ""
    models: Annotated[
        tuple[str | ModelSettings, ...],
        _doc(
            "models to serve: directories, names in --models-dir, hub ids, or name=reference; in a "
            "file also tables with a reference and settings of its own"
        ),
    ] = ()
    quantize: Annotated[
        Quantize,
        _doc("what matrices become in memory; int8 is half of bf16 (none: as in their files)"),
    ] = "none"
    models_dir: Annotated[str, _doc("where imported and downloaded models live")] = (
        "~/.cache/aegaeon/models"
    )
    domain: Annotated[str, _doc("name of this server's shared memory (default: from the port)")] = (
        ""
    )
    metadata_backend: Annotated[
        Literal["shared_memory", "redis"], _doc("where the table and the mailboxes live")
    ] = "shared_memory"
    redis_url: Annotated[str, _doc("the Redis server, with --metadata-backend redis")] = (
        "redis://127.0.0.1:6379/0"
    )
    cluster: Annotated[
        str | ClusterSettings,
        _doc("serve on a Ray cluster, over redis: auto or its address; in a file also a table"),
    ] = ""
    colocated_count: Annotated[
        int,
        _doc(
            "instances that prefill and decode (0: none beside those of other roles; else two on "
            "the CPU where there is room, so that two models may compute at once; one elsewhere)",
            ge=0,
        ),
    ] = 0
    prefill_count: Annotated[int, _doc("instances that prefill and hand over", ge=0)] = 0
    decode_count: Annotated[int, _doc("instances that decode what is handed over", ge=0)] = 0
    device: Annotated[
        str,
        _doc(
            "what instances compute on: cpu, cuda:0 and so on, staged (the CPU with memory of its "
            "own), null (no model)"
        ),
    ] = "cpu"
    threads_per_instance: Annotated[
        int,
        _doc(
            "compute threads of an instance (0: the processors, which instances that compute at "
            "the same time share out)",
            ge=0,
            le=1024,
        ),
    ] = 0
    instruction_set: Annotated[
        Literal["best", "baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16"],
        _doc("instructions that the CPU's operators use (best: the widest it has)"),
    ] = "best"
    kv_dtype: Annotated[
        KvDtype,
        _doc(
            "type of keys and values (auto: float32, with which tokens are the reference's; "
            "bfloat16 holds twice as many, as does float16, which is finer and for cuda only)"
        ),
    ] = "auto"
    activation_dtype: Annotated[
        ActivationDtype,
        _doc(
            "type in which activations meet weights of bfloat16 (auto: float32, with which tokens "
            "are the reference's; bfloat16 rounds as servers on GPUs do, and is up to twice as "
            "fast on processors with AVX-512 BF16)"
        ),
    ] = "auto"
    model_cache_budget_gb: Annotated[
        float, _doc("weights in the node's cache, for all instances, GB (0: 60 % of memory)", ge=0)
    ] = 0.0
    kv_budget_gb: Annotated[
        float,
        _doc("keys and values an instance may hold, GB (0: 10 % of memory, shared out)", ge=0),
    ] = 0.0
    device_memory_gb: Annotated[
        float,
        _doc(
            "a device's own memory, weights and KV, GB (0: 90 % of what a cuda device has, less a "
            "step's workspace, 25 % of the host's for staged; shared out)",
            ge=0,
        ),
    ] = 0.0
    link_gb_per_s: Annotated[
        float, _doc("copy rate to and from a staged device (0: as fast as memory goes)", ge=0)
    ] = 0.0
    prefix_cache: Annotated[
        bool, _doc("keep keys and values of what prompts begin with while nobody needs the room")
    ] = True
    preload_models: Annotated[bool, _doc("load models at start while they fit")] = False
    preload_per_instance: Annotated[
        int, _doc("models that each instance loads at start (0: as many as fit)", ge=0)
    ] = 0
    max_batch: Annotated[int, _doc("sequences of a model that decode together", ge=1)] = 16
    max_running: Annotated[
        int,
        _doc(
            "sequences of a model that run at one instance, those beyond max_batch in rotation (0: "
            "twice as many as max_batch)",
            ge=0,
        ),
    ] = 0
    max_loading: Annotated[
        int, _doc("models that load at once on the node (0: one at each instance)", ge=0, le=1024)
    ] = 0
    max_waiting: Annotated[int, _doc("requests that may wait at one instance", ge=1)] = 1024
    max_open: Annotated[
        int,
        _doc("requests a proxy may have open for each instance, of all models, begun or not", ge=1),
    ] = 4096
    max_open_mb: Annotated[
        float,
        _doc("prompts, log-probabilities and the like of open requests at a proxy, MB", gt=0),
    ] = 512.0
    policy: Annotated[
        Literal["slack", "paper", "request"],
        _doc("who computes next (slack: who is next late; paper: by turns; request: by arrival)"),
    ] = "slack"
    slo_ttft_s: Annotated[
        float, _doc("time in which a first token is promised, for the policy", ge=0.1)
    ] = 10.0
    slo_tbt_s: Annotated[
        float, _doc("time from token to token that is promised, for the policy", ge=0.001)
    ] = 0.1
    costs_file: Annotated[
        str, _doc("JSON of what actions take (null: that), from calibrate.py (default: guessed)")
    ] = ""
    request_timeout_s: Annotated[float, _doc("a request ends in an error after this", gt=0)] = 600.0
    lease_s: Annotated[float, _doc("an instance is gone when silent this long", gt=0)] = 10.0
    watchdog_s: Annotated[
        float,
        _doc(
            "an instance whose step does nothing for so long is restarted (0: never), as is what "
            "does not respond; requests for weights that do not come for so long end in a 503",
            ge=0,
        ),
    ] = 120.0
    drain_s: Annotated[float, _doc("time for running requests to end at shutdown", ge=0)] = 30.0
    max_body_bytes: Annotated[int, _doc("largest HTTP body accepted", ge=1024)] = 8 << 20
    trace_endpoint: Annotated[
        str,
        _doc(
            "where traces of requests go: a collector of OpenTelemetry, by OTLP over HTTP, like "
            "http://localhost:4318 (default: nowhere; needs the extra otel)"
        ),
    ] = ""
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], _doc("how much to log, on stderr")
    ] = "info"
    log_format: Annotated[
        Literal["text", "json"],
        _doc("lines for people, or one JSON object with fields for each event"),
    ] = "text"

    @property
    def domain_name(self) -> str:
        """The shared-memory domain: as set, else one per port."""
        return self.domain or f"port-{self.port}"

    @property
    def clustered(self) -> ClusterSettings | None:
        """The cluster on which to serve, if any."""
        if isinstance(self.cluster, str):
            return ClusterSettings(address=self.cluster) if self.cluster else None
        return self.cluster

    @property
    def cuda_number(self) -> int | None:
        """The N of device cuda:N."""
        return int(self.device[5:]) if self.device.startswith("cuda:") else None

    @property
    def has_own_memory(self) -> bool:
        """Whether devices have memory of their own, to which weights and KV are copied."""
        return self.device == "staged" or self.cuda_number is not None

    @property
    def running(self) -> int:
        """Sequences of a model that run at one instance, as chosen."""
        return self.max_running or 2 * self.max_batch

    @property
    def stored_kv(self) -> StoredKv:
        """The type of keys and values, as chosen."""
        return "float32" if self.kv_dtype == "auto" else self.kv_dtype

    @property
    def activations(self) -> Activations:
        """The type of activations where they meet weights of bfloat16, as chosen."""
        return "float32" if self.activation_dtype == "auto" else self.activation_dtype

    @property
    def colocated(self) -> int:
        """Instances that prefill and decode, as set or chosen."""
        if self.colocated_count or self.prefill_count or self.decode_count:
            return self.colocated_count
        return COLOCATED_ON_CPU if self.device == "cpu" else 1

    @property
    def instance_count(self) -> int:
        """Instances of all roles."""
        return self.prefilling_count + self.decode_count

    @property
    def prefilling_count(self) -> int:
        """Instances that take new requests."""
        return self.colocated + self.prefill_count

    def role_of(self, index: int) -> Role:
        """The role of the instance with this index: first the colocated ones, decoders last."""
        if index < self.colocated:
            return "colocated"
        return "prefill" if index < self.prefilling_count else "decode"


def load_settings(
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    config_file: str | None = None,
) -> Settings:
    """Merge file, environment and flags (later ones win) into checked settings.

    `flags` holds only what was given; `config_file` defaults to AEGAEON_CONFIG. Raises ConfigError.
    """
    environ = os.environ if environ is None else environ
    merged: dict[str, Any] = {}
    path = config_path(config_file, environ)
    if path is not None:
        merged.update(_read_file(path))
    for over in (_from_environment(environ), flags or {}):
        table = merged.get("cluster")
        merged.update(over)
        if isinstance(table, dict) and over.get("cluster"):  # the rest of the table stays
            merged["cluster"] = {**table, "address": over["cluster"]}
    return check_settings(merged)


def config_path(config_file: str | None, environ: Mapping[str, str] | None = None) -> Path | None:
    """Return the file that `load_settings` reads, if any."""
    environ = os.environ if environ is None else environ
    path = config_file or environ.get(PREFIX + "CONFIG")
    return Path(path) if path else None


def check_settings(values: Mapping[str, Any]) -> Settings:
    """Turn plain values into Settings, or raise ConfigError naming field and remedy."""
    known = {field.name for field in msgspec.structs.fields(Settings)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(f"unknown setting {unknown[0]!r}; known are: {', '.join(sorted(known))}")
    try:
        settings = msgspec.convert(dict(values), Settings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"bad setting: {error}") from None
    for name, value in msgspec.structs.asdict(settings).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name} must be a finite number, not {value}")
    if not DOMAIN.fullmatch(settings.domain):
        raise ConfigError(
            f"domain {settings.domain!r} must be at most 100 letters, digits, '.', '_' or '-', "
            "and not begin with '.'; choose another name"
        )
    if not DEVICE.fullmatch(settings.device):
        raise ConfigError(
            f"device {settings.device!r} is none; give cpu, staged, null, or cuda:N (cuda:0 is the "
            "first)"
        )
    if settings.kv_dtype == "float16" and settings.cuda_number is None:
        raise ConfigError(
            f"keys and values of float16 are for cuda devices, not for {settings.device}; give "
            "--kv-dtype bfloat16, or --device cuda:0"
        )
    _check_roles(settings)
    return settings


def _check_roles(settings: Settings) -> None:
    if settings.prefilling_count < 1:
        raise ConfigError(
            "no instance prefills; set --prefill-count or --colocated-count to 1 or more"
        )
    if settings.colocated + settings.decode_count < 1:
        raise ConfigError(
            "no instance decodes; set --decode-count or --colocated-count to 1 or more"
        )


def api_key(environ: Mapping[str, str] | None = None) -> str:
    """Return the key with which commands ask a running server; empty where none is set."""
    return (os.environ if environ is None else environ).get(PREFIX + "API_KEY", "")


def child_environment(over: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment with `over` laid over it, for a child process."""
    return {**os.environ, **over}


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from None
    try:
        values = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not valid {path.suffix[1:] or 'YAML'}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold settings as `name: value` pairs")
    settings = {str(key).replace("-", "_"): value for key, value in values.items()}
    models = settings.get("models")
    if isinstance(models, list):
        settings["models"] = [
            {str(key).replace("-", "_"): value for key, value in one.items()}
            if isinstance(one, dict)
            else one
            for one in models
        ]
    return settings


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    kinds = get_type_hints(Settings)
    values: dict[str, Any] = {}
    for key, text in environ.items():
        if not key.startswith(PREFIX) or key in NOT_SETTINGS:
            continue
        name = key.removeprefix(PREFIX).lower()
        if name not in kinds:
            raise ConfigError(f"unknown environment variable {key}; see `aegaeon serve --help`")
        values[name] = parse_text(kinds[name], text, key)
    return values


def describe(name: str) -> tuple[Any, str, Any]:
    """Return (type, help text, default) of the setting `name`, for flags and documentation."""
    annotated = get_type_hints(Settings, include_extras=True)[name]
    kind, *notes = get_args(annotated)
    text = next(note.description for note in notes if isinstance(note, Meta) and note.description)
    default = next(f.default for f in msgspec.structs.fields(Settings) if f.name == name)
    return kind, text, default
