"""Models that nobody has asked for in a while: they leave the device, and the node's cache once
nobody else has them, so that others have the room.
"""

import logging
from collections.abc import Iterable

from aegaeon.engine.base import Engine
from aegaeon.errors import AegaeonError
from aegaeon.instance.presence import Presence
from aegaeon.scheduler.policies import AnyScheduler
from aegaeon.types import ModelId, ModelSpec

log = logging.getLogger(__name__)

LOOK_S = 0.5


class IdleModels:
    """Owned by the runtime, as what it changes is."""

    def __init__(self, engine: Engine, scheduler: AnyScheduler, presence: Presence) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._presence = presence
        self._used_s: dict[ModelId, float] = {}  # when it was last wanted here
        self._elsewhere_s: dict[ModelId, float] = {}  # when others last had or wanted it
        self._resident: frozenset[ModelId] = frozenset()
        self._look_s = float("-inf")

    def look(self, specs: Iterable[ModelSpec], now: float) -> None:
        """Let go of those of `specs` that are idle, at most every LOOK_S; no load is under way."""
        idle_s = {spec.id: spec.idle_s for spec in specs if spec.idle_s and not spec.is_pinned}
        if not idle_s or now - self._look_s < LOOK_S:
            return
        self._look_s = now
        self._note(idle_s, now)
        cached = self._engine.usage().cached
        for model, most_s in idle_s.items():
            if now - self._used_s[model] < most_s:
                continue
            is_elsewhere = now - self._elsewhere_s.get(model, float("-inf")) < most_s
            was_here = self._scheduler.let_go(model)
            if was_here:
                log.info("idle model let go model=%s idle_s=%g", model, most_s)
            if was_here or (model in cached and not is_elsewhere):
                self._engine.let_go(model, None if is_elsewhere else most_s)

    def _note(self, watched: Iterable[ModelId], now: float) -> None:
        """See who is wanted."""
        for model in watched:
            asked_s = self._scheduler.asked_s(model, now)
            has_come = model not in self._resident and self._scheduler.is_resident(model)
            before_s = now if has_come else self._used_s.get(model, now)
            self._used_s[model] = before_s if asked_s is None else max(before_s, asked_s)
        self._resident = frozenset(filter(self._scheduler.is_resident, watched))
        try:
            rows = self._presence.others()
        except AegaeonError as error:
            log.warning("table not readable error=%s", error)
            self._elsewhere_s = dict.fromkeys(watched, now)  # nobody knows
            return
        for row in rows:
            status = row.status
            for had in (*status.resident, *status.waiting, *status.running, status.loading):
                if had is not None:
                    self._elsewhere_s[had] = now
