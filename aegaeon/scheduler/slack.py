"""The policy `slack`: who is nearest to missing a deadline computes, with weights kept and
prefetched so that switching costs little.

A turn makes its tokens well ahead of their deadlines, so that others can have the device
meanwhile; where there is time to spare, turns are as short as switching allows (`rotation`). What
is needed last makes room for what is needed next (`slack_loads`).
"""

import math
from collections.abc import Mapping, Sequence

from aegaeon.metrics import Target
from aegaeon.scheduler.busyness import Busyness
from aegaeon.scheduler.cost import ModelCost
from aegaeon.scheduler.decisions import TAKES_TURNS
from aegaeon.scheduler.groups import Entry
from aegaeon.scheduler.ledger import Limits
from aegaeon.scheduler.pieces import Bounds, bounds_before, bounds_between, cut
from aegaeon.scheduler.residency import Residency
from aegaeon.scheduler.rotation import Newcomer, Rotation, Stream, Turn, first_of
from aegaeon.scheduler.shedding import Demand, shed
from aegaeon.scheduler.slack_loads import SlackLoads
from aegaeon.scheduler.urgency import SlackGroup, SlackSettings, Survey, Urgency, scaled
from aegaeon.types import Decode, Load, ModelId, Prefill, RequestId, Role, Stretch


class SlackScheduler(SlackLoads):
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
        self._rotation = Rotation()
        self._turn: Turn | None = None  # of it, while all get on by turns
        self._chose_s = 0.0  # whose step is next

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

    def _turn_began(self, group: SlackGroup, now: float) -> None:
        group.joining = len(group.waiting)
        self._rotation.switched(now - self._chose_s, now)

    def _turn_ended(self, group: SlackGroup) -> None:
        group.joining = 0

    def _stepped(self, group: SlackGroup, action: Prefill | Decode, now: float) -> None:
        group.ran_s = now
        group.cost = self._costs[group.model]  # refined meanwhile
        group.owes_step = False
        if isinstance(action, Prefill):
            is_left = any(request in group.waiting for request in action.requests)
            group.owes_step = is_left or action.max_tokens is not None
            self._rotation.prefilled(now)
            joined = sum(request not in group.waiting for request in action.requests)
            group.joining = max(0, group.joining - joined)
            if joined:  # a piece is no help to one that starves
                group.late_since_s = math.inf
            self._changed(group)
            return
        group.late_since_s = math.inf
        if len(group.running) <= len(action.requests):
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
        self._chose_s = now
        self._turn = self._take_turns(now)
        if self._turn is not None:
            self._reason = TAKES_TURNS
            return self._turn.group
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

    def _take_turns(self, now: float) -> Turn | None:
        """Whose turn it is where there is time to spare, and all models are here and in time; else
        None: who then gets ahead ends sooner, and leaves the others more."""
        _, slack_s, ready, absent = self._look(now)
        if len(ready) < 2 or absent or self._planned is not None or self._has_shed:
            return None
        if not self._is_idle or self._kv.first() is not None:
            return None
        if self._rotation.turn_s > min(group.target.tbt_s for group in ready):
            return None
        if min(slack_s[group.model] for group in ready) < -self._set.guard_s:
            return None
        streams = [Stream(g, self._urgency.lead_s(g, now)) for g in ready if g.running]
        found = (self._newcomer_of(group, streams, now) for group in ready)
        newcomers = [newcomer for newcomer in found if newcomer is not None]
        if not (streams or newcomers):
            return None
        current = None if self._current is None else self._groups.get(self._current)
        turn = self._rotation.next(current, streams, first_of(newcomers), now)
        self._other_s = min(slack_s[group.model] for group in ready if group is not turn.group)
        return turn

    def _newcomer_of(
        self, group: SlackGroup, streams: Sequence[Stream], now: float
    ) -> Newcomer | None:
        """Those of `group` that may be prefilled: more than one only if that takes no longer than
        a token may."""
        if not group.waiting or len(group.running) >= self._limits.max_running:
            return None
        picked, cost = self._pick_prefill(group), group.cost
        steps_s = [stream.group.step_s for stream in streams]
        tbt_s = min((stream.group.target.tbt_s for stream in streams), default=math.inf)
        least_s, most_s = bounds_between(steps_s, tbt_s, cost)
        bounds = Bounds(least_s, min(most_s, self._set.piece_s))
        while picked:
            piece = cut([group.waiting[request] for request in picked], cost, bounds)
            if len(piece.requests) == 1 or piece.prefill_s <= group.target.tbt_s:
                slack_s = self._urgency.waiting_due_s(group, now) - now
                rest_s = group.waiting[piece.requests[0]].prefill_s(cost)
                return Newcomer(
                    group, piece.requests, piece.prefill_s, slack_s, piece.max_tokens, rest_s
                )
            picked = picked[:-1]
        return None

    def _find_newcomer(self, best: SlackGroup, now: float) -> SlackGroup | None:
        """Of those ready the most urgent that has a request to prefill; None if `best` has one."""
        if self._kv.first() is not None or (best.waiting and self._pick_prefill(best)):
            return None
        _, slack_s, ready, _ = self._look(now)
        waiting = [group for group in ready if group.waiting and self._pick_prefill(group)]
        return min(waiting, key=lambda group: slack_s[group.model], default=None)

    # What step

    def _step(self, group: SlackGroup, now: float) -> Prefill | Decode | None:
        if self._turn is not None and self._turn.prefill:
            return Prefill(group.model, self._turn.prefill, self._turn.max_tokens)
        if self._turn is None and group.waiting and self._admits(group, now):
            entries = [group.waiting[request] for request in self._pick_prefill(group)]
            if entries:
                piece = cut(entries, group.cost, self._bounds(group, now))
                return Prefill(group.model, piece.requests, piece.max_tokens)
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
        if len(group.running) >= self._limits.max_running or (group.owes_step and group.running):
            return False
        has_room = bool(group.begun) or self._kv.may_prefill(group, now)
        if not has_room or self._urgency.yields(group, self._other_s, now):
            return False
        if group.begun or group.joining or not group.running or self._is_idle:
            return True
        if self._urgency.lead_s(group, now) < self._set.join_s:
            return True
        return self._urgency.waiting_due_s(group, now) - now < self._set.join_slack_s

    def _bounds(self, group: SlackGroup, now: float) -> Bounds:
        """Of a piece in a turn of `group`: those who run, and others who may keep their deadlines,
        are to keep them; and where nobody else is here, nobody's stream is to stand still."""
        is_alone = len(self._active) < 2
        dues_s = [] if is_alone else [self._set.piece_s]
        if self._other_s > self._set.guard_s:
            dues_s.append(self._other_s)
        if not group.running or len(group.waiting) > self._limits.prefill_requests:
            return bounds_before(dues_s, 0.0, group.cost)  # a backlog comes before smooth streams
        step_s = group.cost.decode_s(group.here_tokens, len(group.running))
        dues_s.append(self._urgency.lead_s(group, now) - step_s)
        if not (self._is_idle and is_alone):
            return bounds_before(dues_s, step_s, group.cost)
        least_s, most_s = bounds_between([step_s], group.target.tbt_s, group.cost)
        return Bounds(least_s, min(most_s, *dues_s))

    def _pick_prefill(self, group: SlackGroup) -> tuple[RequestId, ...]:
        """The most urgent ones of those waiting, within the bounds and the memory."""
        limits = self._limits
        most = min(limits.prefill_requests, limits.max_running - len(group.running))
        if group.kv_ticket is not None and not self._kv.is_held():
            most = 1  # alone it fits, or the engine refuses it
        free = self._residency.free_bytes
        if group.running:
            free -= self._residency.kv_margin_bytes // 2
        is_short = bool(group.begun) and self._kv.first() is not None  # only those with KV go on
        tokens = new = 0
        picked: list[RequestId] = []
        for entry in self._urgency.in_order(group):
            has_kv = entry.id in group.begun
            if is_short and not has_kv:
                continue
            new += entry.tokens - entry.known + 1
            tokens += 1 if has_kv else entry.tokens + 1
            too_much = len(picked) >= most or (picked and new > limits.prefill_tokens)
            if too_much or self._residency.kv_bytes(group.model, tokens) > free:
                break
            picked.append(entry.id)
        return tuple(picked)

    def _stretch(self, group: SlackGroup, requests: tuple[RequestId, ...], now: float) -> Stretch:
        """How long nothing changes in what `_choose` and `_step` say if nothing else happens."""
        if self._turn is not None:
            return self._turn_stretch(group, requests, now)
        settings, other_s = self._set, self._other_s
        urgent, tbt_s = self._urgency.urgent(group, now), group.target.tbt_s
        lead_s = urgent.due_s(tbt_s) - now
        steps = self._steps_that_fit(group, len(requests))
        if len(group.running) > len(requests) or group.begun or group.owes_step:
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

    def _turn_stretch(
        self, group: SlackGroup, requests: tuple[RequestId, ...], now: float
    ) -> Stretch:
        """As `_stretch`, in a turn of a rotation: to its end, or till a newcomer may begin."""
        turn, tbt_s = self._turn, group.target.tbt_s
        assert turn is not None
        urgent = self._urgency.urgent(group, now)
        steps = self._steps_that_fit(group, len(requests))
        if len(group.running) > len(requests):
            steps = min(steps, 1)
        until_s = min(self._rotation.ends_s, now + self._other_s + self._set.guard_s)
        return Stretch(steps, until_s, turn.lead_s, urgent.first_s, urgent.made, tbt_s)
