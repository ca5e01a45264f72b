"""Which devices a policy gets, and what bounds them, unless somebody says otherwise."""

from aegaeon.errors import ConfigError
from aegaeon.metrics import Target
from aegaeon.scheduler.ledger import Limits
from aegaeon.scheduler.policies import POLICIES, Fleet, Policy

# Wide: what bounds a simulated device is its memory and its time.
LIMITS = Limits(
    max_batch=256,
    max_running=256,
    max_waiting=1_000_000,
    prefill_requests=8,
    prefill_tokens=8192,
)
SPLIT = {"paper": 3 / 8}  # of the devices prefill, in the paper: 6 of 16


def policy_of(name: str) -> Policy:
    """Return the policy of that name. Raises ConfigError."""
    try:
        return POLICIES[name]
    except KeyError:
        raise ConfigError(f"unknown policy {name!r}; choose from {', '.join(POLICIES)}") from None


def make_fleet(
    policy: str,
    devices: int,
    target: Target = Target(),  # noqa: B008  frozen
    prefill: int | None = None,
) -> Fleet:
    """Return `devices` for `policy`: of both phases, unless `prefill` of them only prefill, or the
    policy splits them. Raises ConfigError."""
    if devices < 1:
        raise ConfigError(f"{devices} devices serve nobody; give --devices 1 or more")
    if prefill is None and policy in SPLIT:
        if devices < 2:
            raise ConfigError(f"the policy {policy} splits prefill from decode; give 2 --devices")
        prefill = max(1, round(devices * SPLIT[policy]))
    if not prefill:
        return Fleet(colocated=devices, target=target, limits=LIMITS)
    if not 0 < prefill < devices:
        raise ConfigError(
            f"--prefill-count {prefill} of {devices} devices leaves none to decode; it is between "
            f"1 and {devices - 1}, or 0 for devices that do both"
        )
    return Fleet(prefill=prefill, decode=devices - prefill, target=target, limits=LIMITS)
