"""The one place that imports ray, when it is asked for: a cluster joined, its nodes as records."""

import logging
from importlib import import_module
from typing import Any

from aegaeon.errors import ConfigError
from aegaeon.nodes import NodeNow

log = logging.getLogger(__name__)

NAMESPACE = "aegaeon"


def ray_module() -> Any:
    """Return ray. Raises ConfigError where it is not installed."""
    try:
        return import_module("ray")
    except ImportError:
        raise ConfigError(
            "--cluster needs Ray, which is not installed; run: pip install 'aegaeon[ray]'"
        ) from None


def join(address: str) -> Any:
    """Join the cluster at `address` as a driver, unless that is done; return ray. Raises
    ConfigError when there is none."""
    ray = ray_module()
    if ray.is_initialized():
        return ray
    try:
        ray.init(
            address=address,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.WARNING,
            configure_logging=False,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"no Ray cluster can be joined at {address} ({first}); start one (ray start --head), "
            "or give its address: --cluster HOST:6379"
        ) from None
    return ray


def nodes_of(ray: Any) -> tuple[NodeNow, ...]:
    """Return the nodes that live, by id."""
    draining = _draining(ray)
    found = [
        NodeNow(
            id=node["NodeID"],
            address=node["NodeManagerAddress"],
            labels=dict(node.get("Labels") or {}),
            resources={
                name: float(amount)
                for name, amount in node["Resources"].items()
                if not name.startswith("node:")
            },
            is_draining=node["NodeID"] in draining,
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return tuple(sorted(found, key=lambda node: node.id))


def _draining(ray: Any) -> frozenset[str]:
    """The ids of nodes that Ray is about to take away: `ray drain-node`, autoscalers, notices of
    spot machines. Ray tells of them by no public name; its own Serve asks here, too."""
    try:
        return frozenset(ray._private.state.state.get_draining_nodes())
    except AttributeError:
        log.warning("this Ray does not tell which nodes it drains version=%s", ray.__version__)
        return frozenset()
