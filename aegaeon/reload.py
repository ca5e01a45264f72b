"""What of a running server follows its configuration file: models and bounds. For the rest it says
that a restart is needed; a file that is wrong changes nothing.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import msgspec

from aegaeon.config import Settings
from aegaeon.errors import AegaeonError, ConfigError
from aegaeon.keeper import bounds_of
from aegaeon.logs import set_level
from aegaeon.memory.budget import lay_out
from aegaeon.memory.machine import read_machine, with_device
from aegaeon.models.references import check_names, served_models
from aegaeon.specs import Bounds, Catalog, check_room
from aegaeon.supervisor import Supervisor
from aegaeon.types import ModelId, ModelSpec

log = logging.getLogger(__name__)

LIVE = frozenset({"models", *Bounds.__struct_fields__})
# What, beside its own entry, says which files a model is and what it costs.
_OF_ALL_MODELS = ("models_dir", "kv_dtype", "quantize")
# Without the path and the words of the error, which are for the log.
COMPLAINT = "the configuration file is not valid, the settings before it stay; see the server's log"

_Version = tuple[int, int, int] | None


class Reloader:
    """Owned by one thread; `ask` may be called by a signal handler. Without a file it does
    nothing."""

    def __init__(
        self,
        path: Path | None,
        load: Callable[[], Settings],
        loaded: Settings,
        supervisor: Supervisor,
        specs: tuple[ModelSpec, ...],
    ) -> None:
        """`load` reads the file, and lays over it what was laid over it at the start, when that
        gave `loaded`, and its models were `specs`."""
        self._path = path if path is not None and path.is_file() else None
        self._load = load
        self._supervisor = supervisor
        self._started = self._settings = loaded
        self._named: dict[ModelId, ModelSpec] = {spec.id: spec for spec in specs}
        self._seen = self._looked_at = self._version()
        self._is_asked = False

    @property
    def has_file(self) -> bool:
        """Whether there is a file that could change."""
        return self._path is not None

    def ask(self) -> None:
        """Have the file read again with the next look, changed or not."""
        self._is_asked = True

    def look(self) -> None:
        """Read the file again if it has changed and is the same for the second time, or if asked:
        an editor may be at it, and half of a file can mean something else. Reading a model's
        headers, or downloading one, takes its time."""
        if self._path is None:
            return
        version, before = self._version(), self._looked_at
        self._looked_at = version
        if not self._is_asked and (version == self._seen or version != before):
            return
        self._seen, self._is_asked = version, False
        try:
            self._apply(self._load())
        except AegaeonError as error:
            log.error("configuration not read again, the old one stays error=%s", error)
            self._complain(COMPLAINT)

    def _apply(self, settings: Settings) -> None:
        before = msgspec.structs.asdict(self._settings)
        changed = {n for n, value in msgspec.structs.asdict(settings).items() if before[n] != value}
        started = msgspec.structs.asdict(self._started)
        asleep = [n for n, value in msgspec.structs.asdict(settings).items() if started[n] != value]
        asleep = sorted(set(asleep) - LIVE)
        if asleep:
            log.warning("restart the server for what has changed of: %s", ", ".join(asleep))
        # With what the server was started with: it is elsewhere, or of another size, after a
        # restart only.
        kept = {name: started[name] for name in _OF_ALL_MODELS}
        specs = served_models(msgspec.structs.replace(settings, **kept))
        if "models" in changed and settings.device != "null":
            chosen = self._supervisor.settings  # with the bytes that were chosen at the start
            lay_out(chosen, specs, with_device(read_machine(), chosen))
        self._supervisor.change(lambda catalog: self._follow(catalog, settings, specs))
        set_level(settings.log_level)
        self._named = {spec.id: spec for spec in specs}
        self._settings = settings
        log.info("configuration read again changed=%s", ",".join(sorted(changed)) or "nothing")

    def _follow(
        self, catalog: Catalog, settings: Settings, specs: tuple[ModelSpec, ...]
    ) -> Catalog:
        """Return the catalogue that the file means. What administrators added, pinned or removed
        stays so until the model's own entry changes."""
        for gone in self._named.keys() - {spec.id for spec in specs}:
            spec = _by_id(catalog, gone)
            if spec is not None:
                catalog = catalog.with_model(msgspec.structs.replace(spec, is_draining=True))
        for spec in specs:
            before = self._named.get(spec.id)
            if spec == before:
                continue
            known = _by_id(catalog, spec.id)
            if known is not None and (known.path, known.quantize) != (spec.path, spec.quantize):
                raise ConfigError(
                    f"{spec.id} is served from {known.path}; take it out of the file first, or "
                    f"serve {spec.path} under another name"
                )
            is_pinned = spec.is_pinned
            if known is not None and before is not None and before.is_pinned == is_pinned:
                is_pinned = known.is_pinned
            catalog = catalog.with_model(msgspec.structs.replace(spec, is_pinned=is_pinned))
        check_names(catalog.models)
        check_room(catalog.models)
        return msgspec.structs.replace(catalog, bounds=bounds_of(settings), complaint="")

    def _complain(self, text: str) -> None:
        try:
            self._supervisor.change(
                lambda catalog: msgspec.structs.replace(catalog, complaint=text)
            )
        except AegaeonError as error:
            log.warning("catalogue not written error=%s", error)

    def _version(self) -> _Version:
        try:
            status = self._path.stat() if self._path is not None else None
        except OSError:
            return None
        return None if status is None else (status.st_mtime_ns, status.st_ino, status.st_size)


def _by_id(catalog: Catalog, model: ModelId) -> ModelSpec | None:
    return next((spec for spec in catalog.models if spec.id == model), None)
