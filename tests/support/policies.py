"""Schedulers of every live policy, told the scripted device's times as costs."""

from collections.abc import Mapping

from aegaeon.metrics import Target
from aegaeon.scheduler.cost import ModelCost
from aegaeon.scheduler.ledger import Limits
from aegaeon.scheduler.policies import POLICIES, AnyScheduler, Fleet
from aegaeon.scheduler.residency import Residency
from aegaeon.types import Role
from tests.support.scripted import STEP_S

LIVE = ("slack",)  # those that hold the contract of live instances


def flat_cost(size: int = 1, step_s: float = STEP_S) -> ModelCost:
    """Every step takes the same."""
    return ModelCost(
        weight_gb=size * 1e-9,
        kv_gb_per_token=1e-9,
        max_len=1 << 30,
        prefill=(0.0, 0.0, step_s),
        decode=(0.0, 0.0, step_s),
    )


def make_scheduler(
    policy: str,
    sizes: Mapping[str, int],
    budget_bytes: int,
    role: Role = "colocated",
    *,
    step_s: float = STEP_S,
    target: Target = Target(),  # noqa: B008  frozen
    **limits: int,
) -> AnyScheduler:
    """A device for the models of `sizes`, with KV of its own."""
    costs = {model: flat_cost(size, step_s) for model, size in sizes.items()}
    fleet = Fleet(target=target, limits=Limits(**limits))
    return POLICIES[policy].scheduler(Residency(sizes, budget_bytes), costs, fleet, role)
