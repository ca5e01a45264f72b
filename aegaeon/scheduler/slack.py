"""The policy `slack`: who is nearest to missing a deadline computes, with weights kept and
prefetched so that switching costs little.

The slack of a model is the time until its most urgent request is late: a waiting one by its TTFT,
a running one by the TBT counted from its first token. A turn makes its tokens well ahead, so that
others can have the device meanwhile.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from aegaeon.metrics import Target
from aegaeon.scheduler.cost import ModelCost
from aegaeon.scheduler.device import DeviceScheduler
from aegaeon.scheduler.groups import Entry, Group
from aegaeon.scheduler.ledger import Limits
from aegaeon.scheduler.residency import Residency
from aegaeon.scheduler.room import Holder, Room, find_room
from aegaeon.scheduler.shedding import Demand, shed
from aegaeon.types import Decode, Load, ModelId, Prefill, RequestId, Role, Stretch

RECENT_S = 20.0
MEMORY_WEIGHT = 0.2  # of a device full of weights, against one whose time is all taken


class SlackSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds, for a TTFT target of 10 s; other targets scale them."""

    ahead_s: float = 9.0  # a turn ends when all its requests are so far ahead
    guard_s: float = 0.3  # and before that for others who have less slack than this
    join_s: float = 2.0  # newcomers join a turn only until it is so far ahead
    join_slack_s: float = 1.5  # or when they have no more than this
    hope_s: float = 3.0  # so late, a request is hopeless
    starve_s: float = 60.0  # for so long the hopeless yield to others
    margin_s: float = 1.5  # by which a victim's slack must be above that of who displaces it
    look_s: float = 0.25  # between looks for room for a load


def scaled(settings: SlackSettings, ttft_s: float) -> SlackSettings:
    """Return `settings` for another TTFT target."""
    values = msgspec.structs.asdict(settings)
    return SlackSettings(**{name: value * ttft_s / 10 for name, value in values.items()})


@dataclass(slots=True)
class SlackGroup(Group):
    """A model's requests and the most urgent of them."""

    urgent: Entry | None = None  # running; None: to be found
    waiting_due_s: float | None = None  # earliest; None: to be found
    joining: int = 0  # that waited when the turn began
    came: int = 0  # requests so far
    shed_until_s: float = 0.0  # others come first until then; 0: it is not shed


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
        self._decode_load = 0.0  # the share of the device's time that keeping up takes
        self._prefill_load = 0.0  # and prefilling what came lately
        self._memory_load = 0.0
        self._prefill_load_s = 0.0  # when it was that
        self._has_shed = False
        self._planned: Load | None = None  # decided with a turn's end, taken by next_load

    def _new_group(self, model: ModelId) -> SlackGroup:
        return SlackGroup(model)

    @property
    def load(self) -> float:
        """The share of its time that keeping up with its models takes, more or less."""
        return self._decode_load + self._prefill_load + self._memory_load

    # Slack

    def _slack_s(self, group: SlackGroup, now: float) -> float:
        """Until the most urgent request of `group` is late; less than 0 when it is."""
        due_s = math.inf
        if group.running:
            due_s = self._due_s(self._urgent(group, now))
        if group.waiting:
            due_s = min(due_s, self._waiting_due_s(group, now))
        if group.shed_until_s:
            due_s = max(due_s, group.shed_until_s)
        return due_s - now

    def _due_s(self, entry: Entry) -> float:
        """When the next token of a running request is due."""
        return entry.first_s + entry.made * self._target.tbt_s

    def _urgent(self, group: SlackGroup, now: float) -> Entry:
        urgent = group.urgent
        if urgent is None or self._due_s(urgent) < now - self._set.hope_s:
            for entry in group.running.values():
                while self._due_s(entry) < now - self._set.hope_s:
                    entry.first_s += self._set.starve_s  # hopeless: its deadlines move on
            urgent = group.urgent = min(group.running.values(), key=self._due_s)
        return urgent

    def _waiting_due_s(self, group: SlackGroup, now: float) -> float:
        """When the first of those waiting must begin to be prefilled."""
        if group.waiting_due_s is None or group.waiting_due_s < now:
            cost = self._costs[group.model]
            earliest_s = math.inf
            for entry in group.waiting.values():
                least_s = self._target.ttft_s - cost.prefill_s(entry.tokens)
                while entry.arrival_s + least_s < now:
                    entry.arrival_s += self._set.starve_s
                earliest_s = min(earliest_s, entry.arrival_s + least_s)
            group.waiting_due_s = earliest_s
        return group.waiting_due_s

    # What happens

    def _entered(self, group: SlackGroup, entry: Entry, now: float) -> None:
        group.came += 1
        cost = self._costs[group.model]
        if group.model not in self._active:
            self._decode_load += cost.decode_s(entry.tokens, 1) / self._target.tbt_s
            self._memory_load += self._memory_share(group.model)
        decay = math.exp((self._prefill_load_s - now) / RECENT_S)
        self._prefill_load = self._prefill_load * decay + cost.prefill_s(entry.tokens) / RECENT_S
        self._prefill_load_s = now
        self._changed(group)

    def _changed(self, group: SlackGroup) -> None:
        group.urgent = None
        group.waiting_due_s = None

    def _quieted(self, group: SlackGroup) -> None:
        group.shed_until_s = 0.0
        self._memory_load -= self._memory_share(group.model)

    def _memory_share(self, model: ModelId) -> float:
        return MEMORY_WEIGHT * self._residency.bytes_of(model) / self._residency.budget_bytes

    def _turn_began(self, group: SlackGroup, now: float) -> None:  # noqa: ARG002
        group.joining = len(group.waiting)

    def _turn_ended(self, group: SlackGroup) -> None:
        group.joining = 0

    def _stepped(self, group: SlackGroup, action: Prefill | Decode, now: float) -> None:  # noqa: ARG002
        if isinstance(action, Prefill):
            group.joining = max(0, group.joining - len(action.requests))
            self._changed(group)
        elif len(group.running) > len(action.requests):
            group.urgent = None

    def _review(self, now: float) -> None:
        """See what keeping up takes, and let the models wait that would cost the others more than
        they gain."""
        demands = []
        total = 0.0
        for model, group in self._active.items():
            requests = len(group.running) + len(group.waiting)
            step_s = self._costs[model].decode_s(group.here_tokens, requests)
            share = step_s / self._target.tbt_s
            total += share
            demands.append(
                Demand(model, share, requests + 3 * group.came, group.shed_until_s > 0.0)
            )
        self._decode_load = total
        if total <= 1.0 and not self._has_shed:
            return
        gone = shed(demands) if len(demands) > 1 else frozenset()
        self._has_shed = bool(gone)
        for group in self._active.values():
            if group.model not in gone:
                group.shed_until_s = 0.0
            elif not group.shed_until_s:
                group.shed_until_s = now + self._set.starve_s

    # Whose step

    def _choose(self, now: float) -> SlackGroup | None:
        runnable = self._runnable(now)
        self._review(now)
        current = None if self._current is None else runnable.get(self._current)
        best, best_s, current_s = None, math.inf, math.inf
        for group in runnable.values():
            if group.away or not self._residency.is_resident(group.model):
                continue
            slack_s = self._slack_s(group, now)
            if group is current:
                current_s = slack_s
            if best is None or slack_s < best_s:
                best, best_s = group, slack_s
        self._reason = "least_slack"
        if current_s < math.inf and best_s >= self._leaves_below_s(current_s):
            best = current
            self._reason = "turn_goes_on"
        if best is not None and self._makes_way(best, now):
            return None
        return best

    def _leaves_below_s(self, current_s: float) -> float:
        """How little slack others must have for a turn to end."""
        is_ahead = current_s >= self._set.ahead_s
        return self._set.ahead_s / 2 if is_ahead else self._set.guard_s

    def _makes_way(self, group: SlackGroup, now: float) -> bool:
        """Whether `group`, which is well ahead, stops so that another one can be loaded in its
        place; then that is planned."""
        if self._residency.loading is not None or self._planned is not None:
            return self._planned is not None
        if self._slack_s(group, now) < self._set.ahead_s or self._find_load(now, group.model):
            return False
        self._planned = self._find_load(now, None)
        if self._planned is None:
            return False
        self._reason = "makes_way"
        return True

    def _step(self, group: SlackGroup, now: float) -> Prefill | Decode | None:
        if group.waiting and self._admits(group, now):
            picked = self._pick_prefill(group)
            if picked:
                return Prefill(group.model, picked)
        if not group.running:
            self._reason = "no_room_for_kv"
            return None
        requests = group.pick_decode(self._limits.max_batch)
        while not self._steps_that_fit(group.model, len(requests)) and len(requests) > 1:
            self._put_back(group, requests[-1])
            requests = group.pick_decode(self._limits.max_batch)
        return Decode(group.model, requests, self._stretch(group, requests, now))

    def _put_back(self, group: SlackGroup, request: RequestId) -> None:
        """Let go the KV of a running request; it is prefilled again when there is room."""
        for entry in group.put_back((request,)):
            self._waiting_count += 1
            self._hold_kv(group, -entry.tokens)
        self._changed(group)

    def _admits(self, group: SlackGroup, now: float) -> bool:
        """Whether newcomers are prefilled now, or wait for the next turn."""
        if len(group.running) >= self._limits.max_running:
            return False
        if not self._kv.may_prefill(group, now):
            return False
        if group.joining or not group.running:
            return True
        if self._due_s(self._urgent(group, now)) - now < self._set.join_s:
            return True
        return self._waiting_due_s(group, now) - now < self._set.join_slack_s

    def _pick_prefill(self, group: SlackGroup) -> tuple[RequestId, ...]:
        """The most urgent ones of those waiting, within the bounds and the memory."""
        limits = self._limits
        most = min(limits.prefill_requests, limits.max_running - len(group.running))
        if group.kv_ticket is not None and not self._kv.is_held():
            most = 1  # alone it fits, or the engine refuses it
        free = self._residency.free_bytes
        if group.running:
            free -= self._residency.kv_margin_bytes // 2
        tokens = 0
        picked: list[RequestId] = []
        entries = group.waiting.values()
        for entry in sorted(entries, key=lambda e: e.arrival_s) if len(entries) > 1 else entries:
            tokens += entry.tokens + 1
            too_much = len(picked) >= most or (picked and tokens > limits.prefill_tokens)
            if too_much or self._residency.kv_bytes(group.model, tokens) > free:
                break
            picked.append(entry.id)
        return tuple(picked)

    def _stretch(self, group: SlackGroup, requests: tuple[RequestId, ...], now: float) -> Stretch:
        """How long nothing changes in what `_choose` and `_step` say if nothing else happens."""
        tbt_s, settings = self._target.tbt_s, self._set
        urgent = self._urgent(group, now)
        lead_s = self._due_s(urgent) - now
        steps = self._steps_that_fit(group.model, len(requests))
        until_s, ahead_s = math.inf, math.inf
        if len(group.running) > len(requests):
            steps = min(steps, 1)
        other_s = self._least_slack_of_others(group, now)
        if other_s < math.inf:
            if lead_s < settings.ahead_s:
                ahead_s = settings.ahead_s
            if other_s > self._leaves_below_s(lead_s):
                until_s = now + other_s - self._leaves_below_s(lead_s)
            else:
                steps = min(steps, max(1, math.ceil((other_s - lead_s) / tbt_s)))
        elif lead_s < settings.ahead_s and len(self._active) > 1:
            ahead_s = settings.ahead_s
        if group.waiting:
            joins_s = self._waiting_due_s(group, now) - settings.join_slack_s
            until_s = min(until_s, joins_s if joins_s > now else now + settings.look_s)
        if self._residency.loading is None and self._wants_load():
            until_s = min(until_s, now + settings.look_s)
        cost = self._costs[group.model]
        if cost.decode_s(group.here_tokens, len(requests)) >= tbt_s:
            until_s = min(until_s, now + settings.look_s)
        return Stretch(steps, until_s, ahead_s, urgent.first_s, urgent.made, tbt_s)

    def _steps_that_fit(self, model: ModelId, requests: int) -> int:
        per_step = self._residency.kv_bytes(model, requests)
        return self._residency.free_bytes // per_step if per_step else 1 << 30

    def _least_slack_of_others(self, but: SlackGroup, now: float) -> float:
        return min(
            (
                self._slack_s(group, now)
                for group in self._active.values()
                if group is not but and not group.away and self._residency.is_resident(group.model)
            ),
            default=math.inf,
        )

    # Loads

    def _wants_load(self) -> bool:
        return any(
            group.away or not self._residency.is_resident(model)
            for model, group in self._active.items()
        )

    def _pick_load(self, now: float) -> Load | None:
        if self._planned is not None:
            planned, self._planned = self._planned, None
            self._reason = "makes_way"
            return planned
        busy = self._in_flight.model if self._in_flight is not None else self._current
        load = self._find_load(now, busy)
        if load is None:
            load = self._find_relief(now, busy)
        return load

    def _find_load(self, now: float, busy: ModelId | None) -> Load | None:
        """The most urgent model of those whose weights or KV are not here, with who makes room
        for it; `busy` stays."""
        runnable = self._runnable(now)
        absent = [
            (self._slack_s(group, now), group)
            for model, group in runnable.items()
            if (group.away or not self._residency.is_resident(model)) and group.load_at_s <= now
        ]
        if not absent:
            return None
        absent.sort(key=lambda pair: pair[0])
        for slack_s, group in absent[:2]:
            room = self._room_for(group, slack_s, now, busy)
            if room is not None:
                self._reason = "least_slack_absent"
                bring = tuple(e.id for e in group.running.values() if not e.is_here)
                return Load(group.model, room.evict, self._kv_of(room.offload), bring)
        return None

    def _room_for(
        self, group: SlackGroup, slack_s: float, now: float, busy: ModelId | None
    ) -> Room | None:
        """Who makes room for the weights of `group`, its KV, and that of its prompts."""
        residency, model = self._residency, group.model
        tokens = sum(entry.tokens for entry in group.waiting.values())
        if group.away:
            tokens += sum(e.tokens for e in group.running.values() if not e.is_here)
        need = residency.kv_bytes(model, tokens) + residency.kv_margin_bytes
        if not residency.is_resident(model):
            need += residency.bytes_of(model)
        missing = need - residency.free_bytes
        if missing <= 0:
            return Room()
        holders = (h for h in self._holders(now) if h.model not in (model, busy))
        return find_room(missing, holders, slack_s + self._set.margin_s)

    def _find_relief(self, now: float, busy: ModelId | None) -> Load | None:
        """Make room in time for the KV of those who compute."""
        missing = self._residency.kv_margin_bytes - self._residency.free_bytes
        if missing <= self._residency.kv_margin_bytes // 2 or self._current is None:
            return None
        holders = (h for h in self._holders(now) if h.model not in (busy, self._current))
        room = find_room(missing, holders, -math.inf)
        if room is None or not self._residency.is_resident(self._current):
            return None
        self._reason = "room_for_kv"
        return Load(self._current, room.evict, self._kv_of(room.offload))

    def _holders(self, now: float) -> list[Holder]:
        """Whoever holds memory, with its slack: idle models have all the time in the world."""
        residency = self._residency
        holders = []
        for model in residency.resident:
            group = self._active.get(model)
            slack_s = math.inf if group is None else self._slack_s(group, now)
            kv = 0 if group is None else residency.kv_bytes(model, group.here_tokens)
            holders.append(Holder(model, slack_s, residency.bytes_of(model), kv))
        for model, group in self._active.items():
            if group.here_tokens and not residency.is_resident(model):
                kv = residency.kv_bytes(model, group.here_tokens)
                if kv and model != residency.loading:
                    holders.append(Holder(model, self._slack_s(group, now), 0, kv))
        return holders

    def _kv_of(self, models: Sequence[ModelId]) -> tuple[RequestId, ...]:
        return tuple(
            entry.id
            for model in models
            for entry in self._groups[model].running.values()
            if entry.is_here
        )
