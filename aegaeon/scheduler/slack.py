"""The policy `slack`: who is nearest to missing a deadline computes, with weights kept and
prefetched so that switching costs little.

A turn makes its tokens well ahead of their deadlines, so that others can have the device
meanwhile. What is needed last makes room for what is needed next.
"""

import math
from collections.abc import Iterable, Mapping

from aegaeon.metrics import Target
from aegaeon.scheduler.busyness import Busyness
from aegaeon.scheduler.cost import ModelCost
from aegaeon.scheduler.device import DeviceScheduler
from aegaeon.scheduler.groups import Entry
from aegaeon.scheduler.ledger import Limits
from aegaeon.scheduler.residency import Residency
from aegaeon.scheduler.room import Holder, Room, find_room
from aegaeon.scheduler.shedding import Demand, shed
from aegaeon.scheduler.urgency import SlackGroup, SlackSettings, Survey, Urgency, scaled
from aegaeon.types import Decode, Load, ModelId, Prefill, RequestId, Role, Stretch


class SlackScheduler(DeviceScheduler[SlackGroup]):
    """Least slack first, over models that are on the device; see the module."""

    def __init__(
        self,
        residency: Residency,
        costs: Mapping[ModelId, ModelCost],
        limits: Limits,
        role: Role,
        target: Target,
        settings: SlackSettings = SlackSettings(),  # noqa: B008  frozen
    ) -> None:
        """`costs` are those of the models served. Nothing is resident yet."""
        super().__init__(residency, tuple(costs), limits, role)
        self._costs = costs
        self._target = target
        self._set = scaled(settings, target.ttft_s)
        self._urgency = Urgency(self._set, self._shares, self._ranks)
        self._busy = Busyness()
        self._has_shed = False
        self._survey: Survey | None = None  # while nothing has happened since
        self._other_s = math.inf  # the least slack of those ready that were not chosen
        self._is_idle: bool | None = None  # since something happened; None: to be found
        self._newcomer: SlackGroup | None = None  # that an idle device turns to
        self._planned: Load | None = None  # decided with a turn's end, taken by next_load

    def _new_group(self, model: ModelId) -> SlackGroup:
        target = self._targets.get(model, self._target)
        return SlackGroup(model, cost=self._costs[model], target=target)

    def promise(self, model: ModelId, target: Target) -> None:
        super().promise(model, target)
        if model in self._groups:
            self._groups[model].target = target
            self._changed(self._groups[model])

    @property
    def load(self) -> float:
        """The share of its time that keeping up with its models takes, more or less."""
        return self._busy.total

    # What happens

    def _something_happened(self) -> None:
        super()._something_happened()
        self._survey = None
        self._is_idle = None

    def _entered(self, group: SlackGroup, entry: Entry, now: float) -> None:
        group.came += 1
        if group.model not in self._active:
            self._busy.decode += group.cost.decode_s(entry.tokens, 1) / group.target.tbt_s
            residency = self._residency
            share = residency.bytes_of(group.model) / residency.budget_bytes
            group.memory_share = self._busy.hold(share)
        self._busy.sum_up(now, group.cost.prefill_s(entry.tokens))
        self._changed(group)

    def _expected(self, group: SlackGroup, entry: Entry, before: int, now: float) -> None:
        self._busy.sum_up(now, entry.prefill_s(group.cost) - entry.prefill_s(group.cost, before))
        self._changed(group)

    def _changed(self, group: SlackGroup) -> None:
        group.changed()

    def _quieted(self, group: SlackGroup) -> None:
        group.shed_until_s = 0.0
        group.late_since_s = math.inf
        self._busy.hold(-group.memory_share)

    def _turn_began(self, group: SlackGroup, now: float) -> None:  # noqa: ARG002
        group.joining = len(group.waiting)

    def _turn_ended(self, group: SlackGroup) -> None:
        group.joining = 0

    def _stepped(self, group: SlackGroup, action: Prefill | Decode, now: float) -> None:  # noqa: ARG002
        group.late_since_s = math.inf
        group.cost = self._costs[group.model]  # refined meanwhile
        if isinstance(action, Prefill):
            group.joining = max(0, group.joining - len(action.requests))
        elif len(group.running) <= len(action.requests):
            group.holds_s = -math.inf  # the same one is the most urgent
            return
        self._changed(group)

    # Whose step

    def _look(self, now: float) -> Survey:
        """Return how things stand."""
        survey = self._survey
        if survey is not None and survey.at_s == now:
            return survey
        survey = self._survey = Survey(now, {}, [], [])
        _, slacks, ready, absent = survey
        refresh, is_resident = self._urgency.refresh, self._residency.is_resident
        share, has_late = 0.0, False
        runnable = self._runnable(now)
        for model, group in runnable.items():
            if now > group.holds_s or group.version != self._shares.version:
                refresh(group, now)
            share += group.step_s / group.target.tbt_s
            slacks[model] = group.due_s - now
            has_late = has_late or group.late_since_s <= now
            if is_resident(model) and not group.away:
                ready.append(group)
            elif group.load_at_s <= now:
                absent.append(group)
        self._busy.decode = share
        self._busy.sum_up(now)
        if self._is_idle is None:
            self._is_idle = self._busy.is_idle
        if self._busy.decode > 1.0 or self._has_shed:
            self._shed(now)
        if self._has_shed or has_late or self._ranks.are_used:
            for model, group in runnable.items():
                slacks[model] = self._urgency.slack_s(group, now)
        return survey

    def _shed(self, now: float) -> None:
        """Let the models wait that would cost the others more than they gain."""
        groups = self._active.values()
        demands = [
            Demand(
                group.model,
                group.step_s / group.target.tbt_s,
                self._urgency.worth(group),
                group.shed_until_s > 0.0,
            )
            for group in groups
        ]
        gone = shed(demands) if len(demands) > 1 else frozenset()
        self._has_shed = bool(gone)
        for group in groups:
            if group.model not in gone:
                group.shed_until_s = 0.0
            elif not group.shed_until_s:
                group.shed_until_s = now + self._set.starve_s

    def _choose(self, now: float) -> SlackGroup | None:
        _, slack_s, ready, absent = self._look(now)
        best, best_s, other_s = None, math.inf, math.inf
        for group in ready:
            group_s = slack_s[group.model]
            if best is None or group_s < best_s:
                best, best_s, other_s = group, group_s, best_s
            elif group_s < other_s:
                other_s = group_s
        if best is None:
            return None
        self._reason = "least_slack"
        current = None if self._current is None else self._groups.get(self._current)
        if current is not None and current is not best and current in ready:
            current_s = slack_s[current.model]
            if best_s >= min(self._set.leaves_below_s(current_s), current_s - self._set.guard_s):
                best, other_s = current, best_s
                self._reason = "turn_goes_on"
        self._newcomer = self._find_newcomer(best, now) if self._is_idle else None
        if self._newcomer is not None and slack_s[best.model] >= self._set.join_s:
            best = self._newcomer
            other_s = min(slack_s[group.model] for group in ready if group is not best)
            self._reason = "newcomer"
        self._other_s = other_s
        if self._planned is not None or (absent and self._makes_way(best, now)):
            return None
        return best

    def _find_newcomer(self, best: SlackGroup, now: float) -> SlackGroup | None:
        """Of those ready the most urgent that has a request to prefill; None if `best` has one."""
        if self._kv.first() is not None or (best.waiting and self._pick_prefill(best)):
            return None
        _, slack_s, ready, _ = self._look(now)
        waiting = [group for group in ready if group.waiting and self._pick_prefill(group)]
        return min(waiting, key=lambda group: slack_s[group.model], default=None)

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

    # What step

    def _step(self, group: SlackGroup, now: float) -> Prefill | Decode | None:
        if group.waiting and self._admits(group, now):
            picked = self._pick_prefill(group)
            if picked:
                return Prefill(group.model, picked)
        if not group.running:
            self._reason = "no_room_for_kv"
            return None
        requests = group.pick_decode(self._limits.max_batch)
        while not self._steps_that_fit(group, len(requests)) and len(requests) > 1:
            self._put_back(group, requests[-1:])
            self._changed(group)
            requests = group.pick_decode(self._limits.max_batch)
        return Decode(group.model, requests, self._stretch(group, requests, now))

    def _admits(self, group: SlackGroup, now: float) -> bool:
        """Whether newcomers are prefilled now, or wait for the next turn."""
        if len(group.running) >= self._limits.max_running:
            return False
        if not self._kv.may_prefill(group, now) or self._urgency.yields(group, self._other_s, now):
            return False
        if group.joining or not group.running or self._is_idle:
            return True
        if self._urgency.lead_s(group, now) < self._set.join_s:
            return True
        return self._urgency.waiting_due_s(group, now) - now < self._set.join_slack_s

    def _pick_prefill(self, group: SlackGroup) -> tuple[RequestId, ...]:
        """The most urgent ones of those waiting, within the bounds and the memory."""
        limits = self._limits
        most = min(limits.prefill_requests, limits.max_running - len(group.running))
        if group.kv_ticket is not None and not self._kv.is_held():
            most = 1  # alone it fits, or the engine refuses it
        free = self._residency.free_bytes
        if group.running:
            free -= self._residency.kv_margin_bytes // 2
        tokens = known = 0
        picked: list[RequestId] = []
        for entry in self._urgency.in_order(group):
            tokens, known = tokens + entry.tokens + 1, known + entry.known
            too_much = len(picked) >= most or (picked and tokens - known > limits.prefill_tokens)
            if too_much or self._residency.kv_bytes(group.model, tokens) > free:
                break
            picked.append(entry.id)
        return tuple(picked)

    def _stretch(self, group: SlackGroup, requests: tuple[RequestId, ...], now: float) -> Stretch:
        """How long nothing changes in what `_choose` and `_step` say if nothing else happens."""
        settings, other_s = self._set, self._other_s
        urgent, tbt_s = self._urgency.urgent(group, now), group.target.tbt_s
        lead_s = urgent.due_s(tbt_s) - now
        steps = self._steps_that_fit(group, len(requests))
        if len(group.running) > len(requests):
            steps = min(steps, 1)
        until_s, ahead_s = math.inf, math.inf
        if lead_s < settings.ahead_s and len(self._active) > 1:
            ahead_s = settings.ahead_s
        if lead_s < settings.join_s and self._newcomer is not None:
            ahead_s = settings.join_s
        waiting_s = math.inf
        if group.waiting:
            waiting_s = self._urgency.waiting_due_s(group, now) - now
            joins_s = waiting_s - settings.join_slack_s
            is_later = joins_s > 0 and not self._is_idle
            until_s = now + (joins_s if is_later else settings.look_s)
        leaves_s = settings.leaves_below_s(min(lead_s, waiting_s))
        if other_s > leaves_s:
            until_s = min(until_s, now + other_s - leaves_s)
        elif waiting_s - settings.guard_s > other_s:
            behind_s = other_s + settings.guard_s - lead_s
            steps = min(steps, max(1, math.ceil(behind_s / tbt_s)))
        is_slow = group.cost.decode_s(group.here_tokens, len(requests)) >= tbt_s
        if is_slow or self._look(now).absent:  # where nobody is well ahead, somebody may starve
            is_urgent = is_slow or lead_s >= settings.ahead_s
            until_s = min(until_s, now + settings.look_s * (1 if is_urgent else 4))
        retry_s = self._loads.next_retry_s(self._active, now)
        until_s = until_s if retry_s is None else min(until_s, retry_s)
        return Stretch(steps, until_s, ahead_s, urgent.first_s, urgent.made, tbt_s)

    # Loads

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
                bring = tuple(e.id for e in group.running.values() if not e.is_here)
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
        waiting = sum(entry.tokens for entry in group.waiting.values())
        need += min(residency.kv_bytes(model, waiting), max(most, self._first_prompt_bytes(group)))
        return find_room(need - residency.free_bytes, holders, above_s)

    def _away_that_fits(self, group: SlackGroup, most: int) -> int:
        """The KV to be brought back, in bytes. While that of all who run is more than `most`, the
        last to come is put back, to be prefilled again behind the others."""
        size, model, running = self._residency.kv_bytes, group.model, group.running
        away = sum(e.tokens for e in running.values() if not e.is_here) if group.away else 0
        while size(model, group.here_tokens + away) > most and len(running) > 1:
            last = max(running.values(), key=lambda entry: entry.arrival_s)
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
        return self._residency.kv_bytes(group.model, first.tokens + 1)

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
