"""What a load needs of devices and links whatever the policy: the yardstick of simulated runs."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

from aegaeon.load_flags import Case
from aegaeon.metrics import Target
from aegaeon.scheduler.cost import ModelCost
from aegaeon.scheduler.policies import USABLE_MEMORY
from aegaeon.sim.workloads import Arrival
from aegaeon.types import ModelId

WINDOWS_S = (1.2, 1.5, 2, 3, 4, 6, 12)  # times the TTFT target


def device_seconds(
    arrivals: Sequence[Arrival], cost: ModelCost, target: Target
) -> Iterator[tuple[float, float]]:
    """Yield when a model steps, and for how long, if it has a device whenever it wants: it steps
    only when a token is due, with all its requests, and so late and in large batches."""
    coming = sorted(arrivals, reverse=True)
    due_s: list[float] = []  # of those running: when the next token is due, and what is missing
    left: list[int] = []
    context = 0
    while coming or left:
        now = min((*due_s, coming[-1].at_s + target.ttft_s if coming else math.inf))
        if left:
            yield now, cost.decode_s(context, len(left))
            context += len(left)
            left = [n - 1 for n in left]
            due_s = [at_s + target.tbt_s for at_s in due_s]
        new = []
        while coming and coming[-1].at_s <= now:
            new.append(coming.pop())
        if new:
            prompts = [one.prompt_tokens for one in new]
            yield now, cost.prefill_s(sum(prompts), sum(n * n for n in prompts))
            context += sum(prompts) + len(new)
            left += [one.output_tokens - 1 for one in new]
            due_s += [now + target.tbt_s] * len(new)
        if 0 in left:
            kept = [index for index, n in enumerate(left) if n > 0]
            ended = len(left) - len(kept)
            context -= ended * context // len(left)  # about; steps hardly depend on it
            left, due_s = [left[index] for index in kept], [due_s[index] for index in kept]


def device_share(case: Case, devices: int, least: float = 1.0) -> float:
    """Return the share of all devices' time that `case` needs if `least` of its requests are to be
    kept, those of the models that cost least for each: of the time until any moment, what has to
    be done by then at the latest."""
    groups: dict[ModelId, list[Arrival]] = defaultdict(list)
    for one in case.load:
        groups[one.model].append(one)
    taken = []
    for model, group in groups.items():
        by_second: dict[int, float] = defaultdict(float)
        for at_s, seconds in device_seconds(group, case.models[model], case.target):
            by_second[int(at_s)] += seconds
        taken.append((by_second, len(group)))
    room = least * len(case.load)
    needed: dict[int, float] = defaultdict(float)
    for by_second, requests in sorted(taken, key=lambda one: sum(one[0].values()) / one[1]):
        part = min(1.0, room / requests)
        room -= part * requests
        for second, seconds in by_second.items():
            needed[second] += part * seconds
    done = itertools.accumulate(needed.get(second, 0.0) for second in range(max(needed) + 1))
    return max(seconds / (devices * end_s) for end_s, seconds in enumerate(done, 1))


def lasts_s(case: Case) -> float:
    """Return when the last request comes."""
    return max(one.at_s for one in case.load)


def link_share(case: Case, devices: int) -> float:
    """Return the share of all links' time that weights need at least: whichever models must have
    the device within a window, and are more than all memories hold, have to come in."""
    room_gb = devices * USABLE_MEMORY * case.costs.device_memory_gb
    link_gb = devices * case.costs.link_gb_per_s * lasts_s(case)
    ttft_s = case.target.ttft_s
    return max(
        math.fsum(
            max(0.0, math.fsum(case.models[model].weight_gb for model in models) - room_gb)
            for models in _touched(case.load, factor * ttft_s, ttft_s)
        )
        / link_gb
        for factor in WINDOWS_S
    )


def _touched(load: Sequence[Arrival], window_s: float, ttft_s: float) -> Iterator[set[ModelId]]:
    """Of windows behind each other, the models whose first token must be made within: those that
    were asked for early enough."""
    windows: dict[int, set[ModelId]] = defaultdict(set)
    for one in load:
        number, into_s = divmod(one.at_s, window_s)
        if into_s + ttft_s <= window_s:
            windows[int(number)].add(one.model)
    yield from windows.values()
