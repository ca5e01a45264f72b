"""The porter of a node, a process: `python -m aegaeon.cluster.porter`, told by JSON on stdin. It
gives the node's models to the porters of other nodes, and has those brought that the node lacks.

There is one on each node, whoever of its members owns it (porters.py). It may be killed at any
time: what has come stays, and its successor goes on from there. Computing comes before it.
"""

import logging
import os
import random
import signal
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import msgspec

from aegaeon import _native
from aegaeon.config import Settings
from aegaeon.errors import AegaeonError
from aegaeon.figures import ProxyFigures, decode_figures, encode_figures
from aegaeon.logs import set_up
from aegaeon.models.here import TEXTS, Here
from aegaeon.models.references import id_of_directory
from aegaeon.nodes import CLUSTER, FILES, ClusterFigures, Coming, NodeFiles, WeightsSettings
from aegaeon.specs import PRIORITIES, Catalog
from aegaeon.store.base import Board, Domain, MetadataStore
from aegaeon.store.domains import join_domain
from aegaeon.transfer.bringing import Bringing, Wanted
from aegaeon.transfer.digests import Progress
from aegaeon.transfer.fetch import MAX_SOURCES, Sources, fetch_texts
from aegaeon.transfer.share import Share, Shelf
from aegaeon.types import ModelSpec

log = logging.getLogger(__name__)

EXIT_CANNOT_START = 2  # with one line on `status_fd`
TURN_S = 0.5
TELL_S = 1.0
SILENT_S = 15.0  # a porter that tells nothing for so long is dead, or cut off
NICE = 10  # a tenth of a processor against who computes
NODE_CHARS = 12  # of a node's name, on the board
TEXT_LANES = 2


class PorterLaunch(msgspec.Struct, frozen=True, kw_only=True):
    """What a porter is told: the settings of its node, which is `node`, at `address`; and what the
    porters of the cluster prove to each other that they know."""

    settings: Settings
    node: str
    address: str
    secret: bytes
    status_fd: int
    parent_pid: int

    def __repr__(self) -> str:
        """Return it without the secret."""
        return f"PorterLaunch(node={self.node!r})"


class Others:
    """What the porters of other nodes, proxies and the controller have told on the board."""

    def __init__(self, board: Board, node: str) -> None:
        """Nothing is read yet; `node` is one's own."""
        self._board = board
        self._node = node
        self._heard: dict[str, tuple[bytes, float]] = {}
        self.files: tuple[NodeFiles, ...] = ()  # of nodes that live
        self.asked: frozenset[str] = frozenset()  # models of which requests are open
        self.has_proxy = False  # here

    def read(self, now: float) -> None:
        """Look at the board. Raises StoreUnavailable, RegionMismatch."""
        nodes: set[str] | None = None
        files, asked = [], set[str]()
        records = self._board.read()
        self._heard = {name: heard for name, heard in self._heard.items() if name in records}
        for name, record in records.items():
            if name != CLUSTER and not name.startswith((FILES, "proxy")):
                continue
            if self._heard.get(name, (b"", 0.0))[0] != record:
                self._heard[name] = record, now
            match decode_figures(record):
                case NodeFiles() as one:
                    files.append((name, one))
                case ProxyFigures(models=models):
                    asked |= {model for model, counted in models.items() if counted.open}
                case ClusterFigures() as cluster:
                    nodes = {node.id for node in cluster.nodes}
                    here = {member.kind for member in cluster.members if member.node == self._node}
                    self.has_proxy = "proxy" in here
        self.asked = frozenset(asked)
        self.files = tuple(
            one
            for name, one in files
            if one.node != self._node
            and (nodes is None or one.node in nodes)
            and now - self._heard[name][1] < SILENT_S
        )

    def holders(self, name: str) -> tuple[str, ...]:
        """Return where some nodes give the model of this name, in any order: not all ask one."""
        known = [one.address for one in self.files if name in one.held]
        return tuple(random.sample(known, min(len(known), MAX_SOURCES)))


class Porter:
    """One thread uses it, from the start to the end."""

    def __init__(self, launch: PorterLaunch, domain: Domain, owned: ExitStack) -> None:
        """Listen; `owned` ends it. Raises TransferError, StoreUnavailable."""
        settings = self._settings = launch.settings
        self._node = launch.node
        self._secret = launch.secret
        self._ways = settings.clustered.weights if settings.clustered else WeightsSettings()
        self._catalog, self._rows = domain.catalog(), domain.metadata()
        self._board = domain.board()
        owned.callback(self._board.close)
        self._others = Others(self._board, launch.node)
        self._models_dir = Path(settings.models_dir).expanduser()
        self._here = Here(self._models_dir, settings.kv_dtype)
        self._shelf = Shelf({}, self._models_dir)
        share = Share(self._shelf, launch.secret, launch.address, self._ways.port)
        owned.callback(share.close)
        share.start()
        self._address = f"{_bracketed(launch.address)}:{share.port}"
        self._bringing = Bringing(self._models_dir)
        owned.callback(self._bringing.close)
        self._texts = Bringing(self._models_dir / TEXTS, _bring_texts, TEXT_LANES)
        owned.callback(self._texts.close)
        self._known = Catalog()
        self._serves = False
        self._beats, self._told_s = 0, float("-inf")

    @property
    def address(self) -> str:
        """Where it gives models, HOST:PORT."""
        return self._address

    def turn(self, now: float) -> None:
        """Look what there is to do, have it done, and tell how it goes."""
        try:
            found = self._catalog.read()
            if found.version >= self._known.version:  # else the store has forgotten it for now
                self._known = found
            self._serves = self._serves or has_instance(self._rows, self._node)
            self._others.read(now)
        except AegaeonError as error:
            log.warning("cluster not readable, as last seen error=%s", error)
        specs = self._known.models
        present = self._here.present(specs)
        there = {spec.id for spec in present}
        self._shelf.offer({name_of(spec): Path(spec.path) for spec in present})
        missing = [spec for spec in self._wanted() if spec.id not in there]
        wrong = {spec.id: why for spec in missing if (why := self._here.why_not(spec))}
        self._bringing.want(
            [_wanted(spec) for spec in missing if spec.id not in wrong and self._serves],
            self._sources,
        )
        texts = [s for s in specs if self._others.has_proxy and self._here.for_text(s) is None]
        self._texts.want([_wanted(spec) for spec in texts], self._sources)
        if now - self._told_s >= TELL_S:
            self._told_s = now
            self._tell([name_of(spec) for spec in present], wrong)

    def _wanted(self) -> list[ModelSpec]:
        """Return what this node is to serve, the first that should be there first: models of which
        requests wait, those that are pinned, those of a higher priority."""
        specs = [spec for spec in self._known.on(self._node) if not spec.is_draining]
        asked = self._others.asked
        return sorted(
            specs,
            key=lambda s: (s.id not in asked, not s.is_pinned, -PRIORITIES.index(s.priority)),
        )

    def _sources(self, wanted: Wanted, failures: int) -> Sources:
        """At first others are asked that may have it; they may still be starting. Only then it is
        downloaded, lest all nodes do."""
        return Sources(
            shared_dirs=self._ways.shared,
            peers=self._others.holders(wanted.name),
            secret=self._secret,
            has_hub=failures > 0,
            order=self._ways.order,
        )

    def _tell(self, held: list[str], wrong: dict[str, str]) -> None:
        coming = self._texts.coming() | self._bringing.coming()
        coming |= {model: Coming(failure=why) for model, why in wrong.items()}
        self._beats += 1
        figures = NodeFiles(
            node=self._node,
            address=self._address,
            beats=self._beats,
            held=tuple(held),
            coming=coming,
        )
        try:
            self._board.publish(FILES + self._node[:NODE_CHARS], encode_figures(figures))
        except AegaeonError as error:
            log.warning("not told what this node has error=%s", error)


def name_of(spec: ModelSpec) -> str:
    """Return what nodes call a model among themselves: by its directory, the same on all."""
    return id_of_directory(Path(spec.path))


def _wanted(spec: ModelSpec) -> Wanted:
    return Wanted(spec.id, name_of(spec))


def _bring_texts(name: str, directory: Path, sources: Sources, _: Progress) -> object:
    return fetch_texts(name, directory, sources)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def has_instance(rows: MetadataStore, node: str) -> bool:
    """Whether instances live on `node` that need weights. Raises StoreUnavailable."""
    records = (row.record for row in rows.sync_for_routing())
    return any(record.node == node and record.device != "null" for record in records)


def serve(launch: PorterLaunch) -> None:
    """Be the porter of a node until the end of this process. Raises AegaeonError."""
    with ExitStack() as owned:
        domain = join_domain(launch.settings)
        owned.callback(domain.close)
        porter = Porter(launch, domain, owned)
        os.close(launch.status_fd)
        log.info("porter up node=%s address=%s", launch.node[:8], porter.address)
        while True:
            began_s = time.monotonic()
            porter.turn(began_s)
            time.sleep(max(0.0, began_s + TURN_S - time.monotonic()))


def main() -> int:
    """Read the launch record and be the porter; SIGTERM ends it at once."""
    launch = msgspec.json.decode(sys.stdin.buffer.read(), type=PorterLaunch)
    _native.die_with_parent(signal.SIGKILL, launch.parent_pid)
    set_up(launch.settings.log_level, "porter", launch.settings.log_format)
    with suppress(OSError):
        os.nice(NICE)
    try:
        serve(launch)
    except AegaeonError as error:
        log.error("porter ends error=%s", error)
        with suppress(OSError), open(launch.status_fd, "w", encoding="utf-8") as status:  # noqa: PTH123
            status.write(str(error))
        return EXIT_CANNOT_START
    return 0


if __name__ == "__main__":
    sys.exit(main())
