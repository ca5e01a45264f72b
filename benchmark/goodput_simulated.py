"""What the simulator says of the load that a benchmark serves."""

import msgspec

from aegaeon.metrics import Attainment, Target, attainment
from aegaeon.scheduler.cost import Costs
from aegaeon.scheduler.ledger import Limits
from aegaeon.scheduler.policies import POLICIES, USABLE_MEMORY, Fleet
from aegaeon.sim.cluster import simulate
from aegaeon.sim.workloads import Load, models_of

LIVE_LIMITS = Limits(max_batch=16, max_running=32)


def way_of(policy: str) -> tuple[str, bool]:
    """Return the policy's name, and whether its two devices have roles of their own."""
    name = policy.removesuffix("-split")
    return name, name != policy


def slowed(costs: Costs, slowness: float) -> Costs:
    """Return `costs` of steps that take `slowness` times as long."""
    models = {
        model: msgspec.structs.replace(
            cost,
            prefill=_times(slowness, cost.prefill),
            decode=_times(slowness, cost.decode),
        )
        for model, cost in costs.models.items()
    }
    return msgspec.structs.replace(costs, models=models)


def _times(factor: float, line: tuple[float, float, float]) -> tuple[float, float, float]:
    return (factor * line[0], factor * line[1], factor * line[2])


def predict(load: Load, costs: Costs, policy: str, target: Target) -> Attainment:
    """Return what two devices of `costs`, whose memory is for weights only, reach under `policy`.

    Live, keys and values have memory of their own, which these loads do not fill.
    """
    costs = msgspec.structs.replace(costs, device_memory_gb=costs.device_memory_gb / USABLE_MEMORY)
    models = {
        model: msgspec.structs.replace(cost, kv_gb_per_token=0.0)
        for model, cost in costs.of(tuple(sorted(models_of(load)))).items()
    }
    name, is_split = way_of(policy)
    fleet = Fleet(
        colocated=0 if is_split else 2,
        prefill=int(is_split),
        decode=int(is_split),
        target=target,
        limits=LIVE_LIMITS,
    )
    simulated = simulate(load, models, costs, POLICIES[name], fleet)
    return attainment(simulated.served, target)
