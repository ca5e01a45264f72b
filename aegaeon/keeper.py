"""The supervisor's side of what all see: the catalogue, written at the start and kept, with models
that drain taken out once nobody has a request of theirs; and of what instances died.
"""

import logging
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import msgspec

from aegaeon.child import Child
from aegaeon.config import Settings
from aegaeon.deaths import DEATHS, MAX_DEATHS, Death, encode_deaths, name_of
from aegaeon.errors import AegaeonError, RegionError
from aegaeon.figures import ProxyFigures, decode_figures
from aegaeon.models.config import config_of, read_config
from aegaeon.placements import Placement
from aegaeon.specs import Bounds, Catalog, ModelSpec
from aegaeon.store.base import Board, MetadataStore
from aegaeon.store.catalog import CatalogStore
from aegaeon.types import Instance, InstanceId, ModelId

log = logging.getLogger(__name__)

TEND_S = 0.2  # between two looks
# Without a request anywhere, before a model that drains goes; proxies tell of theirs each second.
QUIET_S = 2.0
SILENT_S = 15.0  # a proxy that tells nothing for so long is dead

KvSizes = tuple[int, int, int]


class CatalogKeeper:
    """Owned by the supervisor's thread; `catalog` may be changed by anybody."""

    def __init__(
        self, catalog: CatalogStore, metadata: MetadataStore, board: Board, first: Catalog
    ) -> None:
        """Write `first`. Raises StoreUnavailable, RegionError."""
        self._store = catalog
        self._metadata = metadata
        self._proxies = _Proxies(board)
        self._known = catalog.change(lambda _: first)
        self._quiet_since_s: dict[ModelId, float] = {}
        self._tended_s = float("-inf")

    def current(self) -> Catalog:
        """Return the catalogue; as last seen while the store does not answer."""
        try:
            found = self._store.read()
            if found.version < self._known.version:
                # The store has forgotten it; its version goes on from where it was.
                self._store.swap(
                    found.version,
                    msgspec.structs.replace(self._known, version=self._known.version + 1),
                )
                found = self._store.read()
            self._known = found
        except AegaeonError as error:
            log.warning("catalogue not readable error=%s", error)
        return self._known

    def place(self, placement: Placement, rows: Iterable[Instance] = ()) -> None:
        """Have models live there from here on, in a version that all instances of `rows` follow:
        one beyond what they have seen, for a store that was emptied while nobody kept the
        catalogue begins anew. Raises StoreUnavailable, RegionError."""
        seen = max((row.status.catalog for row in rows), default=0)
        while True:
            before = self._store.read()
            version = max(before.version, seen) + 1
            after = msgspec.structs.replace(before, placement=placement, version=version)
            if self._store.swap(before.version, after):
                self._known = after
                return

    def tend(self, now: float) -> None:
        """Take out the models that have drained; call it often."""
        if now - self._tended_s < TEND_S:
            return
        self._tended_s = now
        draining = [spec.id for spec in self.current().models if spec.is_draining]
        if not draining:
            self._quiet_since_s.clear()
            return
        try:
            # An instance may be gone, of whose requests only their proxies know just now.
            busy = _busy(self._metadata.sync_for_routing()) | self._proxies.busy(now)
            for model in draining:
                self._tend_draining(model, model in busy, now)
        except AegaeonError as error:
            log.warning("models not drained error=%s", error)

    def _tend_draining(self, model: ModelId, is_busy: bool, now: float) -> None:
        if is_busy:
            self._quiet_since_s.pop(model, None)
            return
        if now - self._quiet_since_s.setdefault(model, now) < QUIET_S:
            return
        del self._quiet_since_s[model]

        def without(catalog: Catalog) -> Catalog:
            spec = catalog.find(model)
            is_gone = spec is not None and spec.id == model and spec.is_draining
            return catalog.without_model(model) if is_gone else catalog

        self._known = self._store.change(without)
        log.info("model drained and removed model=%s", model)


class _Proxies:
    """What proxies have published of open requests; of the dead, for a while."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._heard: dict[str, tuple[bytes, float]] = {}  # the last record, and since when

    def busy(self, now: float) -> set[ModelId]:
        """Return the models of which requests are open. Raises StoreUnavailable, RegionMismatch."""
        found: set[ModelId] = set()
        for name, record in self._board.read().items():
            if name.endswith(DEATHS):
                continue
            if self._heard.get(name, (b"", 0.0))[0] != record:
                self._heard[name] = record, now
            figures = decode_figures(record)
            if isinstance(figures, ProxyFigures) and now - self._heard[name][1] < SILENT_S:
                found |= {model for model, one in figures.models.items() if one.open}
        return found


class DeathKeeper:
    """Tells on the board what instances were doing when they died. Owned by the supervisor's
    thread, and the only one who writes there under these names."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._deaths: dict[InstanceId, tuple[Death, ...]] = {}
        self._untold: set[InstanceId] = set()

    def note(self, child: Child) -> None:
        """The process of an instance has been buried; nobody else asks what it did. Raises
        StoreUnavailable: `tell` later."""
        work, instance = child.last_work(), child.name
        child.forget_work()
        log.info("was at work name=%s work=%s", instance, work)
        before = self._deaths.get(instance, ())
        self._deaths[instance] = (*before, Death(child.incarnation, work))[-MAX_DEATHS:]
        self._untold.add(instance)
        self.tell()

    def tell(self) -> None:
        """Publish what has not been; call it now and then. Raises StoreUnavailable."""
        for instance in tuple(self._untold):
            try:
                self._board.publish(name_of(instance), encode_deaths(self._deaths[instance]))
            except RegionError as error:
                log.warning("death not told yet name=%s error=%s", instance, error)
            else:
                self._untold.discard(instance)

    def close(self) -> None:
        """Let go of the board. Idempotent."""
        self._board.close()


def _busy(rows: Iterable[Instance]) -> set[ModelId]:
    """The models that have requests anywhere."""
    return {
        model
        for row in rows
        for counts in (row.status.waiting, row.status.running)
        for model, count in counts.items()
        if count
    }


def bounds_of(settings: Settings) -> Bounds:
    """Return what of `settings` may change while it serves."""
    return Bounds(**{name: getattr(settings, name) for name in Bounds.__struct_fields__})


def model_directories(models_dir: str) -> tuple[str, ...]:
    """Return what may be a model in `models_dir`, which need not exist."""
    root = Path(models_dir).expanduser()
    try:
        return tuple(str(path) for path in root.iterdir() if (path / "config.json").is_file())
    except OSError:
        return ()


def kv_sizes(models: Iterable[str | ModelSpec]) -> tuple[KvSizes, ...]:
    """Return layers, heads and head_dim of keys and values of each kind of model, of directories or
    by specs; which of them cannot be read, and why, is told by who serves it."""
    found = set()
    for one in models:
        with suppress(AegaeonError):
            config = config_of(one) if isinstance(one, ModelSpec) else read_config(one)
            found.add((config.layers, config.kv_heads, config.head_dim))
    return tuple(sorted(found))
