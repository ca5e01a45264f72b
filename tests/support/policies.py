"""Schedulers of every live policy, told the scripted device's times as costs."""

from collections.abc import Mapping

from aegaeon.metrics import Target
from aegaeon.scheduler.cost import Costs, ModelCost
from aegaeon.scheduler.ledger import Limits
from aegaeon.scheduler.policies import POLICIES, AnyScheduler, Fleet
from aegaeon.scheduler.residency import Residency
from aegaeon.types import Role
from tests.support.scripted import LOAD_S, STEP_S, SWITCH_S

LIVE = ("slack", "paper", "request")  # all hold the contract of live instances
SHARING = ("slack", "paper")  # a long request does not keep the device from others
PREFETCHING = ("slack",)  # keep several models, and load beside computing


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
    models = {model: flat_cost(size, step_s) for model, size in sizes.items()}
    costs = Costs(
        link_gb_per_s=1e-9 / LOAD_S,
        device_memory_gb=budget_bytes * 1e-9,
        models=models,
        model_mix=tuple(models),
        switch_s=SWITCH_S,
    )
    fleet = Fleet(target=target, limits=Limits(**limits))
    return POLICIES[policy].scheduler(Residency(sizes, budget_bytes), costs, fleet, role)
