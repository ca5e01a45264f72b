"""The policies by name: how each schedules a device, and where it sends requests."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from aegaeon.metrics import Target
from aegaeon.scheduler.cost import Costs, ModelCost
from aegaeon.scheduler.device import DeviceScheduler
from aegaeon.scheduler.groups import Group
from aegaeon.scheduler.ledger import Limits
from aegaeon.scheduler.paper import PaperDispatcher, PaperRules
from aegaeon.scheduler.paper_decode import PaperDecode
from aegaeon.scheduler.paper_prefill import PaperPrefill
from aegaeon.scheduler.places import Dispatcher, HomeDispatcher
from aegaeon.scheduler.request import RequestDispatcher, RequestRules, RequestScheduler
from aegaeon.scheduler.residency import Residency
from aegaeon.scheduler.slack import SlackScheduler
from aegaeon.types import ModelId, Role

AnyScheduler = DeviceScheduler[Group]
USABLE_MEMORY = 0.9  # of a device, for weights and KV; the rest is for activations


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """How many devices of each role, and what is promised to clients."""

    colocated: int = 0
    prefill: int = 0
    decode: int = 0
    target: Target = Target()
    limits: Limits = Limits()

    @property
    def roles(self) -> tuple[Role, ...]:
        """The role of each device."""
        kinds: tuple[tuple[Role, int], ...] = (
            ("colocated", self.colocated),
            ("prefill", self.prefill),
            ("decode", self.decode),
        )
        return tuple(role for role, count in kinds for _ in range(count))


@dataclass(frozen=True, slots=True)
class Policy:
    """A named policy."""

    name: str
    scheduler: Callable[[Residency, Costs, Fleet, Role], AnyScheduler]  # costs of those served
    dispatcher: Callable[[], Dispatcher]

    def schedulers(
        self, fleet: Fleet, costs: Costs, models: Mapping[ModelId, ModelCost]
    ) -> list[AnyScheduler]:
        """Return one for each device of `fleet`, whose weights and KV share its memory."""
        weights = {model: round(cost.weight_gb * 1e9) for model, cost in models.items()}
        kv = {model: round(cost.kv_gb_per_token * 1e9) for model, cost in models.items()}
        budget = round(costs.device_memory_gb * USABLE_MEMORY * 1e9)
        served = msgspec.structs.replace(costs, models=dict(models))
        schedulers = []
        for index, role in enumerate(fleet.roles):
            scheduler = self.scheduler(Residency(weights, budget, kv), served, fleet, role)
            scheduler.name(f"device-{index}")
            schedulers.append(scheduler)
        return schedulers


def _slack(residency: Residency, costs: Costs, fleet: Fleet, role: Role) -> AnyScheduler:
    return SlackScheduler(residency, costs.models, fleet.limits, role, fleet.target)  # type: ignore[return-value]


def paper(rules: PaperRules = PaperRules()) -> Policy:  # noqa: B008  frozen
    """Return the policy of the paper with `rules`."""

    def scheduler(residency: Residency, costs: Costs, fleet: Fleet, role: Role) -> AnyScheduler:
        kind = PaperPrefill if role == "prefill" else PaperDecode
        return kind(residency, costs, fleet.limits, role, fleet.target, rules)

    return Policy("paper", scheduler, PaperDispatcher)


def request(rules: RequestRules = RequestRules()) -> Policy:  # noqa: B008  frozen
    """Return the baseline with `rules`."""

    def scheduler(residency: Residency, costs: Costs, fleet: Fleet, role: Role) -> AnyScheduler:
        return RequestScheduler(residency, tuple(costs.models), fleet.limits, role, rules)

    return Policy("request", scheduler, lambda: RequestDispatcher(rules))


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("slack", _slack, HomeDispatcher),
        paper(),
        request(),
    )
}
