"""What will befall the server, and when: drawn from a seed before it begins, the same every time.

Times only; how a fault is done is faults.py.
"""

import random
from collections.abc import Mapping

import msgspec

LEASE_S = 4.0  # of an instance

# The shortest and the longest that a fault lasts; what is killed is started again by others.
SHORT_S = (0.1, 3.0)
# Some come back late by a moment, when others have just taken over; some are given up before.
PAST_LEASE_S = (LEASE_S - 0.2, LEASE_S + 5.0)
AT_ONCE_S = (0.0, 0.0)
# From before it reads what it is told to after it serves.
START_UP_S = (0.0, 2.5)

FAULTS: Mapping[str, tuple[float, float]] = {
    "an instance killed": AT_ONCE_S,
    "both instances killed": AT_ONCE_S,
    "an instance killed as it starts": START_UP_S,
    "an instance paused": SHORT_S,
    "an instance paused past its lease": PAST_LEASE_S,
    "a proxy killed": AT_ONCE_S,
    "a proxy paused": SHORT_S,
    "a proxy paused for long": (4.0, 16.0),
    "the supervisor paused": PAST_LEASE_S,
    "a model removed and added again": SHORT_S,
}
REDIS_FAULTS: Mapping[str, tuple[float, float]] = {
    "Redis killed and started again": (0.1, 2.0),
    "Redis killed while a model is removed": SHORT_S,
    "Redis paused": SHORT_S,
    # Longer than its clients wait for an answer, too.
    "Redis paused past all leases": (LEASE_S - 0.2, LEASE_S + 8.0),
}


class Planned(msgspec.Struct, frozen=True):
    """A fault that begins `at_s` after the start. `pick`, in [0, 1), says whom it befalls."""

    at_s: float
    what: str
    pick: float
    lasts_s: float


class Done(msgspec.Struct, frozen=True):
    """A fault as it was: when it began, how long it took, and whom it befell."""

    at_s: float
    what: str
    whom: str
    took_s: float


def draw(seed: int, seconds: float, every_s: float, has_redis: bool) -> tuple[Planned, ...]:
    """Return the faults of a run, each about `every_s` after the one before has begun."""
    dice = random.Random(f"faults {seed}")
    kinds = {**FAULTS, **(REDIS_FAULTS if has_redis else {})}
    plan: list[Planned] = []
    at_s = 0.0
    while True:
        at_s += every_s * (0.5 + dice.random())
        if at_s >= seconds:
            return tuple(plan)
        what = dice.choice(list(kinds))
        plan.append(Planned(at_s, what, dice.random(), dice.uniform(*kinds[what])))
