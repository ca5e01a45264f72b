"""How many devices a load needs: the smallest number that keeps what is promised."""

from collections.abc import Callable

import msgspec


class Sizing(msgspec.Struct, frozen=True):
    """What a policy needs. `devices` is None where not even the most that were tried suffice;
    `attainment_request` is that of `devices`, or else of the most. `tried` are all runs."""

    policy: str
    devices: int | None
    attainment_request: float
    tried: tuple[tuple[int, float], ...]


def find_least(
    policy: str, kept: Callable[[int], float], *, first: int, most: int, share: float = 0.9
) -> Sizing:
    """Return the least number of devices, from `first` to `most`, with which `kept` is at least
    `share`.

    Doubles until it is enough, then halves what is left: more devices are taken to keep no less.
    """
    tried: dict[int, float] = {}

    def is_enough(devices: int) -> bool:
        if devices not in tried:
            tried[devices] = kept(devices)
        return tried[devices] >= share

    too_few, enough = first - 1, first
    while not is_enough(enough) and enough < most:
        too_few, enough = enough, min(2 * enough, most)
    while is_enough(enough) and enough - too_few > 1:
        middle = (too_few + enough) // 2
        if is_enough(middle):
            enough = middle
        else:
            too_few = middle
    found = enough if is_enough(enough) else None
    return Sizing(policy, found, tried[enough], tuple(sorted(tried.items())))
