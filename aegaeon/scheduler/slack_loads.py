"""What the policy `slack` loads, and who makes room for it: what is needed last."""

import math
from abc import abstractmethod
from collections.abc import Iterable

from aegaeon.scheduler.device import DeviceScheduler
from aegaeon.scheduler.room import Holder, Room, find_room
from aegaeon.scheduler.urgency import SlackGroup, SlackSettings, Survey, Urgency
from aegaeon.types import Load, ModelId


class SlackLoads(DeviceScheduler[SlackGroup]):
    """The copy lane's half of the policy."""

    _set: SlackSettings
    _urgency: Urgency
    _planned: Load | None  # decided with a turn's end

    @abstractmethod
    def _look(self, now: float) -> Survey:
        """Return how things stand."""

    def _makes_way(self, group: SlackGroup, now: float) -> bool:
        """Whether `group`, which is well ahead or holds up one that starves, stops so that another
        one can be loaded in its place; then that is planned."""
        if self._residency.loading is not None:
            return False
        is_ahead = self._look(now).slack_s[group.model] >= self._set.ahead_s
        is_pressed = is_ahead or self._urgency.is_pressed(group, self._look(now))
        if not is_pressed or self._find_load(now, group.model):
            return False
        self._planned = self._find_load(now, None)
        if self._planned is None:
            return False
        self._reason = "makes_way"
        return True

    def _pick_load(self, now: float) -> Load | None:
        if self._planned is not None:
            planned, self._planned = self._planned, None
            self._reason = "makes_way"
            return planned
        computing = None if self._in_flight is None else self._in_flight.model
        busy = computing or (self._current if self._current in self._look(now).slack_s else None)
        load = self._find_load(now, busy) or self._find_relief(now, busy)
        if load is None and computing is None and not self._look(now).ready:
            # All are too urgent to make way for each other: somebody has to.
            load = self._find_load(now, None, margin_s=-math.inf)
        return load

    def _find_load(
        self, now: float, busy: ModelId | None, margin_s: float | None = None
    ) -> Load | None:
        """The most urgent model of those whose weights or KV are not here, with who makes room for
        it; `busy` stays, and so do those that have not `margin_s` more slack."""
        margin_s = self._set.margin_s if margin_s is None else margin_s
        _, slack_s, _, absent = self._look(now)
        most = 1 if self._look(now).starves(self._set.starve_s) else 2
        for group in sorted(absent, key=lambda group: slack_s[group.model])[:most]:
            holders = self._holders(now, {group.model, busy})
            room = self._room_for(group, busy, holders, slack_s[group.model] + margin_s)
            if room is not None:
                self._reason = "least_slack_absent"
                bring = tuple(e.id for e in group.holders if not e.is_here)
                return Load(group.model, room.evict, self._kv_of(room.offload), bring)
        return None

    def _room_for(
        self, group: SlackGroup, busy: ModelId | None, holders: Iterable[Holder], above_s: float
    ) -> Room | None:
        """Who of `holders` makes room for the weights of `group`, its KV and that of its prompts,
        beside `busy`: those with more slack than `above_s`."""
        residency, model = self._residency, group.model
        most = residency.budget_bytes - residency.kv_margin_bytes - residency.bytes_of(model)
        away = self._away_that_fits(group, most)
        need = residency.kv_margin_bytes + away
        if not residency.is_resident(model):
            need += residency.bytes_of(model)
        # Prompts for which the device is too small even so have to wait for those before them.
        most -= residency.kv_bytes(model, group.here_tokens) + away
        most -= residency.bytes_of(busy) if busy and busy != model else 0
        new = (entry for entry in group.waiting.values() if entry.id not in group.begun)
        waiting = sum(entry.tokens for entry in new)
        need += min(residency.kv_bytes(model, waiting), max(most, self._first_prompt_bytes(group)))
        return find_room(need - residency.free_bytes, holders, above_s)

    def _away_that_fits(self, group: SlackGroup, most: int) -> int:
        """The KV to be brought back, in bytes. While that of all who have some is more than `most`,
        the last to come is put back, to be prefilled again behind the others."""
        size, model = self._residency.kv_bytes, group.model
        away = sum(e.tokens for e in group.holders if not e.is_here) if group.away else 0
        while size(model, group.here_tokens + away) > most and len(group.holders) > 1:
            last = max(group.holders, key=lambda entry: entry.arrival_s)
            away -= 0 if last.is_here else last.tokens
            self._put_back(group, (last.id,))
            self._changed(group)
        return size(model, away)

    def _first_prompt_bytes(self, group: SlackGroup) -> int:
        """The KV of the request of `group` that has waited longest, if it cannot wait for those
        that run."""
        if group.running or not group.waiting:
            return 0
        first = self._urgency.in_order(group)[0]
        held = first.tokens if first.id in group.begun else 0
        return self._residency.kv_bytes(group.model, first.tokens + 1 - held)

    def _find_relief(self, now: float, busy: ModelId | None) -> Load | None:
        """Make room in time for the KV of those who compute."""
        current, residency = self._current, self._residency
        if current is None:
            return None
        missing = residency.kv_margin_bytes - residency.free_bytes
        group = self._active.get(current)
        if group is not None and not group.running:
            missing = max(missing, self._first_prompt_bytes(group) - residency.free_bytes)
        elif missing <= residency.kv_margin_bytes // 2:
            return None
        if missing <= 0:
            return None
        room = find_room(missing, self._holders(now, {current, busy}), -math.inf)
        if room is None or not residency.is_resident(current):
            return None
        self._reason = "room_for_kv"
        return Load(current, room.evict, self._kv_of(room.offload))

    def _holders(self, now: float, but: set[ModelId | None]) -> Iterable[Holder]:
        """Who holds memory, with its slack: idle models have all the time in the world."""
        slack_s, residency = self._look(now).slack_s, self._residency
        for model in residency.resident:
            if model not in but:
                group = self._active.get(model)
                kv = 0 if group is None else residency.kv_bytes(model, group.here_tokens)
                holder_s = slack_s.get(model, math.inf)
                yield Holder(model, holder_s, residency.evictable_bytes(model), kv)
        for model, group in self._active.items():
            if group.here_tokens and model not in but and not residency.is_resident(model):
                kv = residency.kv_bytes(model, group.here_tokens)
                if kv and model != residency.loading:
                    yield Holder(model, slack_s.get(model, math.inf), 0, kv)
