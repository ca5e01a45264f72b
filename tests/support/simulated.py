"""Small simulated fleets, and an account of a device's memory kept beside its scheduler's."""

import dataclasses
from collections.abc import Callable

from aegaeon.scheduler.cost import Costs, ModelCost
from aegaeon.scheduler.policies import Policy
from aegaeon.sim.workloads import Load, poisson, prepare
from aegaeon.types import Decode, Handoff, Loaded, Prefill, Ran, Stepped

# Two models of the larger kind fill a device; KV of a few long prompts does, too.
COSTS = Costs(
    link_gb_per_s=16.0,
    device_memory_gb=40.0,
    models={
        "small": ModelCost(8.0, 2e-3, 4096, (2e-5, 1e-10, 0.01), (2e-7, 1e-4, 0.009)),
        "large": ModelCost(14.0, 4e-3, 4096, (4e-5, 1e-10, 0.01), (3e-7, 1e-4, 0.014)),
    },
    model_mix=("small", "large"),
)
LENGTHS = ((50, 40), (400, 150), (1200, 5), (30, 600), (900, 1))


def make_case(
    models: int = 8, rate: float = 0.1, horizon_s: float = 40.0, seed: int = 0
) -> tuple[Load, dict[str, ModelCost]]:
    """Return a load of so many models, and what these cost."""
    load = poisson(models, rate, horizon_s, LENGTHS, seed=seed)
    return prepare([load], COSTS, 0.0, horizon_s, 1)


class Account:
    """Stands before a scheduler and counts from its actions what lies on the device; asserts that
    this is never more than the budget."""

    def __init__(self, inner, costs, budget_bytes):
        self.inner = inner
        self.most = 0
        self._costs = costs
        self._budget = budget_bytes
        self._weights = set()
        self._requests = {}
        self._here = {}  # tokens whose KV is on the device
        self._away = {}
        self._action = None

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def submit(self, request, now):
        self._requests[request.id] = request
        self.inner.submit(request, now)

    def adopt(self, request, now):
        self._requests[request.id] = request
        self._away[request.id] = self._prefilled_tokens(request.id) - 1  # the last is to be run
        self.inner.adopt(request, now)

    def next_action(self, now):
        self._action = self.inner.next_action(now)
        for request in tuple(self._here):  # put back in line: its KV is let go
            is_waiting = request in self.inner._groups[self._requests[request].model].waiting
            if is_waiting and not self.inner.has_begun(request):
                del self._here[request]
        match self._action:
            case Prefill():
                for request in self._action.requests:
                    self._here[request] = self._prefilled_tokens(request)
            case Handoff():
                self._here.pop(self._action.request)
        self._check()
        return self._action

    def next_load(self, now):
        load = self.inner.next_load(now)
        if load is not None:
            assert not set(load.offload) & set(load.bring)
            self._weights.difference_update(load.evict)
            self._weights.add(load.model)
            for request in load.offload:
                self._away[request] = self._here.pop(request)
            for request in load.bring:
                self._here[request] = self._away.pop(request)
            self._check()
        return load

    def complete(self, outcome, now):
        match outcome:
            case Ran():
                assert isinstance(self._action, Decode)
                for request in self._action.requests:
                    if request in self._here:
                        self._here[request] += outcome.steps
                self._check()
                for request in outcome.ended:
                    self._forget(request)
            case Stepped():
                for token in outcome.tokens:
                    if token.finish_reason is not None:
                        self._forget(token.request_id)
            case Loaded():
                assert outcome.model in self._weights
        self.inner.complete(outcome, now)

    def cancel(self, request, now):
        self._forget(request)
        self.inner.cancel(request, now)

    def _prefilled_tokens(self, request):
        asked = self._requests[request]  # KV of the token made now comes with the next step
        return len(asked.prompt_token_ids) + len(asked.generated_token_ids)

    def _forget(self, request):
        self._requests.pop(request, None)
        self._here.pop(request, None)
        self._away.pop(request, None)

    def _check(self):
        used = sum(round(self._costs[model].weight_gb * 1e9) for model in self._weights)
        for request, tokens in self._here.items():
            model = self._requests[request].model
            used += round(self._costs[model].kv_gb_per_token * 1e9) * tokens
        self.most = max(self.most, used)
        assert used <= self._budget, f"{used / 1e9:.3f} GB of {self._budget / 1e9:.3f}"


def with_accounts(policy: Policy, note: Callable[[Account], None]) -> Policy:
    """Return `policy` with an account before each scheduler; `note` hears of them."""

    def scheduler(residency, costs, fleet, role):
        inner = policy.scheduler(residency, costs, fleet, role)
        kinds = getattr(costs, "models", costs)
        account = Account(inner, kinds, residency.budget_bytes)
        note(account)
        return account

    return dataclasses.replace(policy, scheduler=scheduler)
