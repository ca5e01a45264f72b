"""What requests that come at a rate take of devices, if each token is made when it is promised."""

import math

import msgspec

from aegaeon.metrics import Target
from aegaeon.scheduler.cost import ModelCost

FULL = 0.75  # of a device's time; a model that needs more of it has a part of another one


class Flow(msgspec.Struct, frozen=True):
    """Requests of a model: how many a second, and their mean lengths in tokens."""

    requests_per_s: float
    prompt_tokens: float
    output_tokens: float


def busy(flow: Flow, cost: ModelCost, target: Target) -> float:
    """Return the seconds of devices that `flow` takes in a second.

    Whoever makes tokens no sooner than promised has all requests of a model in one step a TBT: so
    many run as come while one makes its tokens, by a Poisson distribution if they come
    independently of each other (M/G/infinity), and a step is due as long as any does. On more
    devices than one each has a part of the flow, and steps of its own.
    """
    devices = 1
    while (each := _busy(flow, cost, target, 1 / devices)) > FULL:
        # All together take no less on more devices: fewer than these are never enough.
        devices = max(devices + 1, math.ceil(each * devices / FULL))
    return devices * each


def loads_per_s(flow: Flow, target: Target) -> float:
    """Return how often its weights must come in at least, where others take their place as soon as
    no request runs: as often as one comes when none is there."""
    return flow.requests_per_s * math.exp(-flow.requests_per_s * _stay_s(flow, target))


def _busy(flow: Flow, cost: ModelCost, target: Target, part: float) -> float:
    rate = flow.requests_per_s * part
    running = rate * _stay_s(flow, target)
    per_token, per_request, fixed = (max(0.0, number) for number in cost.decode)
    context = flow.prompt_tokens + flow.output_tokens / 2
    step_s = fixed * -math.expm1(-running) + (per_request + per_token * context) * running
    return rate * cost.prefill_s(round(flow.prompt_tokens)) + step_s / target.tbt_s


def _stay_s(flow: Flow, target: Target) -> float:
    return max(flow.output_tokens - 1, 0.0) * target.tbt_s
