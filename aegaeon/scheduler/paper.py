"""What the two halves of the policy `paper` share: its rules, its quotas, and who goes where.

The algorithms are those of Aegaeon (SOSP'25): grouped prefill, and decoding in weighted turns.
"""

from collections.abc import Sequence

import msgspec

from aegaeon.scheduler.places import Dispatcher, Place
from aegaeon.types import ModelId


class PaperRules(msgspec.Struct, frozen=True, kw_only=True):
    """The text's rules; what else they might be, so that a run can show what each is worth."""

    max_group: int = 8  # requests in a group, those executed counted
    longest_turn_s: float = 4.0
    least_alpha: float = 0.5
    keeps_resident: bool = False  # weights and KV stay after a turn, while there is room
    load_counts_groups: bool = False  # of a prefill device: groups rather than seconds
    joins_round: bool = True  # a new batch has its first turn in the round under way


def quotas(
    step_s: Sequence[float], switch_s: float, tbt_s: float, rules: PaperRules
) -> tuple[float, ...]:
    """Return how long each batch of a round decodes: Algorithm 2.

    A step of batch i takes `step_s[i]`, and makes tokens for n_i = TBT / step_s[i] as long. With c
    = `switch_s`, what all switches of the round take: alpha = max(c / (min n * longest turn) + sum
    1 / n, least alpha) and q_i = c / (n_i * (alpha - sum 1 / n)). So all q_i * n_i, the time that
    the tokens of a turn last, are the same, and a round takes alpha times that.
    """
    worth = [tbt_s / step for step in step_s]
    busy = sum(1 / n for n in worth)
    alpha = max(switch_s / (min(worth) * rules.longest_turn_s) + busy, rules.least_alpha)
    if alpha <= busy:  # switching takes no time
        return tuple(rules.longest_turn_s * min(worth) / n for n in worth)
    return tuple(switch_s / (n * (alpha - busy)) for n in worth)


class PaperDispatcher(Dispatcher):
    """To a group or batch of the model that has room, wherever it is; else to the least load."""

    def dispatch(self, places: Sequence[Place], model: ModelId) -> int:
        """Return the first place where `model` joins others, or the least busy one."""
        for index, place in enumerate(places):
            if place.joins(model):
                return index
        return min(range(len(places)), key=lambda index: places[index].load)

    def dispatch_prefilled(self, places: Sequence[Place], model: ModelId) -> int:
        """As `dispatch`."""
        return self.dispatch(places, model)
