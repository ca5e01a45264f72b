"""Turns of models that are all on the device, as short as switching between them allows: where
everybody is in time, nobody's stream stands still for others to get ahead.

No deadline is kept here: who is about to miss one comes first, and then the policy takes over.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from aegaeon.scheduler.urgency import SlackGroup
from aegaeon.types import RequestId

WORTH = 25.0  # a turn lasts so many times what a switch takes
MUCH_SHORTER = 2.0
FALLS, RISES = 0.5, 0.125  # how far what a switch takes follows one that was quicker, or slower

LEAST_S = 1e-3  # by so much it may always seem to rise


class Stream(NamedTuple):
    """A model with running requests, and how far ahead the most urgent of them is."""

    group: SlackGroup
    lead_s: float


class Newcomer(NamedTuple):
    """A model with requests to prefill, or the next `max_tokens` of their prompts, what that takes,
    how long they may wait, and what all of the first one's prompt takes from here on."""

    group: SlackGroup
    requests: tuple[RequestId, ...]
    prefill_s: float
    slack_s: float
    max_tokens: int | None = None
    rest_s: float = 0.0


class Turn(NamedTuple):
    """Whose it is, and whom it prefills, with what bound in tokens: nobody where it decodes. Then
    it may be over, for a newcomer's sake, once its most urgent request is `lead_s` ahead."""

    group: SlackGroup
    prefill: tuple[RequestId, ...] = ()
    lead_s: float = math.inf
    max_tokens: int | None = None


def first_of(newcomers: Sequence[Newcomer]) -> Newcomer | None:
    """Return who of them is prefilled first: the one that can wait least, unless it can for as long
    as its own prompt takes, and another one, which is much shorter, keeps it little."""
    if not newcomers:
        return None
    urgent = min(newcomers, key=lambda one: one.slack_s)
    if urgent.slack_s < urgent.rest_s:
        return urgent
    shortest = min(newcomers, key=lambda one: one.rest_s)
    return shortest if MUCH_SHORTER * shortest.rest_s <= urgent.rest_s else urgent


class Rotation:
    """Who is next; steps and switches are told."""

    def __init__(self) -> None:
        """Switching takes for ever until it has been seen to end."""
        self._switch_s = math.inf
        self.ends_s = 0.0  # of the turn under way
        self._prefilled_s = -1.0

    @property
    def turn_s(self) -> float:
        """How long a turn lasts; at least a step."""
        return WORTH * self._switch_s

    def switched(self, took_s: float, now: float) -> None:
        """A turn begins. A switch that was held up by something else says little."""
        if self._switch_s == math.inf:
            self._switch_s = took_s
        more_s = min(took_s - self._switch_s, self._switch_s + LEAST_S)
        self._switch_s += more_s * (RISES if more_s > 0 else FALLS)
        self.ends_s = now + self.turn_s

    def prefilled(self, now: float) -> None:
        """A prefill has ended."""
        self._prefilled_s = now

    def next(
        self,
        current: SlackGroup | None,
        streams: Sequence[Stream],
        newcomer: Newcomer | None,
        now: float,
    ) -> Turn:
        """Return whose turn it is, of at least one. `current` has the device.

        Between two prefills every stream gets a step, and a prefill waits until it makes none of
        them late, or until it would itself be late before they are.
        """
        if not streams:
            assert newcomer is not None
            return _prefill(newcomer)
        longest = self._next_of(streams)
        lead_s = min(stream.lead_s for stream in streams)
        needed_s = math.inf if newcomer is None else self._needed_s(newcomer, streams, longest)
        goes_on = current is not None and now < self.ends_s
        owner = next((one for one in streams if goes_on and one.group is current), None)
        if newcomer is not None:
            is_current = goes_on and newcomer.group is current
            if is_current and owner is None:
                return _prefill(newcomer)
            if needed_s <= lead_s and (is_current or owner is None):
                return _prefill(newcomer)
        if owner is None:
            owner = longest
            if owner.group is current:
                self.ends_s = now + self.turn_s
        return Turn(owner.group, (), needed_s if owner.lead_s <= lead_s else math.inf)

    def _next_of(self, streams: Sequence[Stream]) -> Stream:
        """The one that has waited longest, but for one that would be late after another turn."""
        urgent = min(streams, key=lambda stream: stream.lead_s)
        if urgent.lead_s < self.turn_s + 2 * self._switch_s + urgent.group.step_s:
            return urgent
        return min(streams, key=lambda stream: stream.group.ran_s)

    def _needed_s(self, newcomer: Newcomer, streams: Sequence[Stream], longest: Stream) -> float:
        """How far ahead all of `streams` have to be for a prefill."""
        if min(stream.group.ran_s for stream in streams) <= self._prefilled_s:
            return math.inf
        return min(newcomer.slack_s, newcomer.prefill_s + longest.group.step_s)


def _prefill(newcomer: Newcomer) -> Turn:
    return Turn(newcomer.group, newcomer.requests, max_tokens=newcomer.max_tokens)
