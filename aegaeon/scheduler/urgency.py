"""How long until a model's requests are late: the slack by which the policy `slack` goes."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from aegaeon.metrics import Target
from aegaeon.scheduler.cost import ModelCost
from aegaeon.scheduler.fairness import Shares
from aegaeon.scheduler.groups import Entry, Group
from aegaeon.scheduler.ranks import Ranks
from aegaeon.types import ModelId

LEAST_TTFT_S = 0.01  # by which settings are scaled; at 0 nothing would ever yield


class SlackSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds, for a TTFT target of 10 s; other targets scale them."""

    ahead_s: float = 8.0  # a turn ends when all its requests are so far ahead
    guard_s: float = 0.3  # and before that for others who have less slack than this
    join_s: float = 2.0  # newcomers join a turn only until it is so far ahead
    join_slack_s: float = 1.5  # or when they have no more than this
    hope_s: float = 3.0  # so late, a request is hopeless
    starve_s: float = 60.0  # for so long the hopeless yield to others
    margin_s: float = 1.5  # by which a victim's slack must be above that of who displaces it
    look_s: float = 0.25  # between looks for room for a load
    share_s: float = 1.0  # of the device: who has had so much more than others yields a TTFT
    yield_s: float = 2.5  # slack that one of a lower priority always seems to have
    piece_s: float = 1.0  # of a prefill, at most, where there are other models' requests
    press_s: float = 2.0  # and that one of a higher priority seems to have less

    def leaves_below_s(self, current_s: float) -> float:
        """Return how little slack others must have for a turn to end, whose own is so much."""
        return self.ahead_s / 2 if current_s >= self.ahead_s else self.guard_s


def scaled(settings: SlackSettings, ttft_s: float) -> SlackSettings:
    """Return `settings` for another TTFT target."""
    values = msgspec.structs.asdict(settings)
    scale = max(ttft_s, LEAST_TTFT_S) / 10
    return SlackSettings(**{name: value * scale for name, value in values.items()})


@dataclass(slots=True, eq=False, kw_only=True)
class SlackGroup(Group):
    """A model's requests, and the most urgent of them."""

    cost: ModelCost
    target: Target  # promised of this model
    urgent: Entry | None = None  # running; None: to be found
    waiting_due_s: float | None = None  # earliest; None: to be found
    joining: int = 0  # that waited when the turn began
    came: int = 0  # requests so far
    memory_share: float = 0.0  # that it wants of the device
    shed_until_s: float = 0.0  # others come first until then; 0: it is not shed
    late_since_s: float = math.inf  # no step since a request was hopelessly late
    ran_s: float = -math.inf  # when its last step ended
    owes_step: bool = False  # to those who run, since a prefill that has not ended all prompts
    # What follows from its requests, until `holds_s` or a change of them.
    due_s: float = math.inf
    step_s: float = 0.0  # of decoding all of them
    holds_s: float = -math.inf
    version: int = 0  # of the shares that this follows from

    def changed(self) -> None:
        """Its requests are not what they were."""
        self.urgent = None
        self.waiting_due_s = None
        self.holds_s = -math.inf


class Survey(NamedTuple):
    """Who has how much slack at one moment: those that may compute, and those whose weights or KV
    are not here and might be."""

    at_s: float
    slack_s: dict[ModelId, float]
    ready: list[SlackGroup]
    absent: list[SlackGroup]

    def starves(self, starve_s: float) -> bool:
        """Whether one that is not here has been late for so long that it comes before all."""
        return any(self.slack_s[group.model] <= -starve_s for group in self.absent)


class Urgency:
    """Deadlines of requests: a waiting one is due by its TTFT, the k-th token of a running one k
    TBT after its first. Those that are hopelessly late get new deadlines, later by `starve_s`; a
    model that has had no step for so long since then comes before all others. Until then one of a
    lower priority than others here never seems to be late, and so yields to those that are."""

    def __init__(self, settings: SlackSettings, shares: Shares, ranks: Ranks) -> None:
        self._shares = shares
        self._ranks = ranks
        self._yield_s = settings.yield_s
        self._press_s = settings.press_s
        self._share_s = settings.share_s
        self._hope_s = settings.hope_s
        self._starve_s = settings.starve_s

    def slack_s(self, group: SlackGroup, now: float) -> float:
        """Return the time until the most urgent request of `group`, which has some, is late; less
        than 0 when it is."""
        if now > group.holds_s or group.version != self._shares.version:
            self.refresh(group, now)
        if now - group.late_since_s >= self._starve_s:
            return min(group.due_s, group.late_since_s) - now
        slack_s = max(group.due_s, group.shed_until_s) - now
        return self._ranked_s(group, slack_s, now) if self._ranks.are_used else slack_s

    def _ranked_s(self, group: SlackGroup, slack_s: float, now: float) -> float:
        """Return the slack as those of other priorities are to see it."""
        below, above = self._ranks.below(group.model), self._ranks.above(group.model)
        if above:
            # Its late requests have new deadlines, for each other's sake and for nobody else's.
            slack_s = min(slack_s, group.late_since_s - now)
        if below:
            # Less than the half of `ahead_s`, below which those that are well ahead make way.
            slack_s = max(slack_s, self._yield_s * (1 + below) / 2)
        return slack_s - self._press_s if above else slack_s

    def is_pressed(self, group: SlackGroup, survey: Survey) -> bool:
        """Whether `group` should make way though it is not well ahead: for one that starves, or is
        of a higher priority."""
        if survey.starves(self._starve_s):
            return True
        own = self._ranks.of(group.model)
        return self._ranks.are_used and any(
            self._ranks.of(other.model) > own for other in survey.absent
        )

    def refresh(self, group: SlackGroup, now: float) -> None:
        """Find out anew when `group`, which has requests, is due."""
        if group.version != self._shares.version:
            group.version = self._shares.version
            group.waiting_due_s = None
        due_s = holds_s = math.inf
        if group.running:
            due_s = self.urgent(group, now).due_s(group.target.tbt_s)
            holds_s = due_s + self._hope_s
        if group.waiting:
            waiting_s = self.waiting_due_s(group, now)
            due_s, holds_s = min(due_s, waiting_s), min(holds_s, waiting_s)
        group.due_s, group.holds_s = due_s, holds_s
        requests = len(group.running) + len(group.waiting)
        group.step_s = group.cost.decode_s(group.here_tokens, requests)

    def lead_s(self, group: SlackGroup, now: float) -> float:
        """Return how far ahead the most urgent of those running is."""
        return self.urgent(group, now).due_s(group.target.tbt_s) - now

    def urgent(self, group: SlackGroup, now: float) -> Entry:
        """Return the most urgent of those running, of whom there are some."""
        urgent = group.urgent
        hopeless_s, tbt_s = now - self._hope_s, group.target.tbt_s
        if urgent is None or urgent.first_s + urgent.made * tbt_s < hopeless_s:
            for entry in group.running.values():
                late_s = hopeless_s - entry.due_s(tbt_s)
                if late_s > 0:
                    entry.first_s += self._moved_s(late_s)
                    group.late_since_s = min(group.late_since_s, now)
            urgent = group.urgent = min(group.running.values(), key=lambda e: e.due_s(tbt_s))
        return urgent

    def waiting_due_s(self, group: SlackGroup, now: float) -> float:
        """Return when the first of those waiting, of whom there are some, must be prefilled."""
        due_s = group.waiting_due_s
        if due_s is None or due_s < now:
            due_s = math.inf
            for entry in group.waiting.values():
                least_s = group.target.ttft_s - entry.prefill_s(group.cost)
                late_s = now - self.came_s(group, entry) - least_s
                if late_s > 0 and not self._shares.is_owed(entry.id, self._share_s):
                    entry.arrival_s += self._moved_s(late_s)
                    group.late_since_s = min(group.late_since_s, now)
                due_s = min(due_s, self.came_s(group, entry) + least_s)
            group.waiting_due_s = due_s
        return due_s

    def yields(self, group: SlackGroup, other_s: float, now: float) -> bool:
        """Whether those waiting of `group` let another model go first, whose slack is `other_s`,
        for what their keys have had."""
        if not group.running or not self._shares.is_shared:
            return False
        return self.waiting_due_s(group, now) - now > other_s

    def worth(self, group: SlackGroup) -> float:
        """Return how many requests `group` serves and has served, as much as those here count."""
        requests = (*group.running, *group.waiting)
        worth = self._shares.worth(requests) * self._ranks.worth(group.model)
        return (len(requests) + 3 * group.came) * worth

    def in_order(self, group: SlackGroup) -> list[Entry]:
        """Return those waiting of `group`, the first to be prefilled first."""
        return sorted(group.waiting.values(), key=lambda entry: self.came_s(group, entry))

    def came_s(self, group: SlackGroup, entry: Entry) -> float:
        """Return from when on `entry`, which waits, has waited: later than it came where its key
        has had more of the device than others."""
        yielded_s = self._shares.ahead_s(entry.id) / self._share_s * group.target.ttft_s
        return entry.arrival_s + min(yielded_s, self._starve_s)

    def _moved_s(self, late_s: float) -> float:
        """By how much the deadline of a request moves that is so late."""
        return self._starve_s * math.ceil(late_s / self._starve_s)
