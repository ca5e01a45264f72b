"""Models on their way to a node, in the background: a few at a time, each again after longer and
longer waits for as long as it is wanted. What keeps one from coming keeps no other.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aegaeon.errors import AegaeonError
from aegaeon.nodes import Coming
from aegaeon.transfer.digests import Progress
from aegaeon.transfer.fetch import Sources, fetch

log = logging.getLogger(__name__)

LANES = 2  # models that come at once; each comes from several sources by several threads
BACKOFF_S = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)  # before it is tried again, by failures in a row
STOP_S = 30.0  # for fetches to notice that they are not wanted


class NotWanted(AegaeonError):
    """The model that was being fetched is not wanted here any more."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model that is to come: its id, and its directory's name."""

    id: str
    name: str


@dataclass(slots=True)
class _Way:
    """How it goes with one model. `thread` None: it waits for its turn, or for `due_s`."""

    wanted: Wanted
    thread: threading.Thread | None = None
    is_wanted: bool = True
    done_bytes: int = 0
    total_bytes: int = 0
    failure: str = ""
    failures: int = 0
    due_s: float = field(default=float("-inf"))


Fetch = Callable[[str, Path, Sources, Progress], object]


class Bringing:
    """Brings models into `models_dir`. One thread calls `want` and `close`; it owns its threads."""

    def __init__(
        self,
        models_dir: Path,
        bring: Fetch = fetch,
        lanes: int = LANES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is wanted yet."""
        self._models_dir = models_dir
        self._bring = bring
        self._lanes = lanes
        self._clock = clock
        self._lock = threading.Lock()
        self._ways: dict[str, _Way] = {}

    def want(self, wanted: Sequence[Wanted], sources_of: Callable[[Wanted, int], Sources]) -> None:
        """Have these come and no others, the first first. `sources_of` says where one may come from
        that has failed so often; what is under way goes on with what was said when it began."""
        with self._lock:
            names = {one.name for one in wanted}
            for name, way in tuple(self._ways.items()):
                if name not in names:
                    way.is_wanted = False
                    if way.thread is None:
                        del self._ways[name]
            for one in wanted:
                way = self._ways.setdefault(one.name, _Way(one))
                way.is_wanted = True
            under_way = sum(way.thread is not None for way in self._ways.values())
            for one in wanted:
                way = self._ways[one.name]
                if under_way >= self._lanes:
                    break
                if way.thread is None and self._clock() >= way.due_s:
                    self._begin(way, sources_of(one, way.failures))
                    under_way += 1

    def coming(self) -> dict[str, Coming]:
        """Return how it goes with each model that is wanted, by its id."""
        with self._lock:
            now = self._clock()
            return {
                way.wanted.id: Coming(
                    way.done_bytes,
                    way.total_bytes,
                    way.failure,
                    round(max(0.0, way.due_s - now), 1) if way.thread is None else 0.0,
                )
                for way in self._ways.values()
                if way.is_wanted
            }

    def close(self) -> None:
        """Break off what is under way; another time it goes on from there. Idempotent."""
        with self._lock:
            for way in self._ways.values():
                way.is_wanted = False
            threads = [way.thread for way in self._ways.values() if way.thread is not None]
        for thread in threads:
            thread.join(STOP_S)

    def _begin(self, way: _Way, sources: Sources) -> None:
        args = (way, sources)
        name = f"fetch {way.wanted.name}"
        # A daemon: one that hangs in the system, or in the hub's library, holds nobody's end up.
        way.thread = threading.Thread(target=self._run, args=args, name=name, daemon=True)
        way.thread.start()

    def _run(self, way: _Way, sources: Sources) -> None:
        def progress(done: int, total: int) -> None:
            if not way.is_wanted:
                raise NotWanted(f"{way.wanted.name} is not wanted here any more")
            way.done_bytes, way.total_bytes = done, total

        failure = ""
        try:
            log.info("model is fetched model=%s", way.wanted.id)
            self._bring(way.wanted.name, self._models_dir, sources, progress)
        except AegaeonError as error:
            failure = str(error)
        except Exception as error:  # of this model alone
            log.exception("fetch crashed model=%s", way.wanted.id)
            failure = f"the fetch crashed ({error}); the log of the node's porter says where"
        with self._lock:
            self._ended(way, failure)

    def _ended(self, way: _Way, failure: str) -> None:
        way.thread, way.failure = None, failure
        if not failure or not way.is_wanted:
            # One that has come is wanted no more by who looks; until then it is there already.
            del self._ways[way.wanted.name]
            return
        wait_s = BACKOFF_S[min(way.failures, len(BACKOFF_S) - 1)]
        way.failures += 1
        way.due_s = self._clock() + wait_s
        log.warning(
            "model not fetched model=%s again_in_s=%.0f error=%s", way.wanted.id, wait_s, failure
        )
