"""`aegaeon serve --cluster`: the controller started, watched, and drained when we are asked to end.

Killed, it leaves the server running; run again, it finds it.
"""

import ipaddress
import logging
import time
from collections.abc import Callable
from typing import Any

import msgspec

from aegaeon.cluster.controller import Controller, ControllerLaunch, ControllerLook
from aegaeon.cluster.finding import find_models
from aegaeon.cluster.link import NAMESPACE, join, nodes_of, ray_module
from aegaeon.cluster.porters import cluster_secret
from aegaeon.config import Settings
from aegaeon.errors import ConfigError, InstanceLost
from aegaeon.keeper import kv_sizes, model_directories
from aegaeon.nodes import MemberNow, NodeNow
from aegaeon.store.redis_url import read_place

log = logging.getLogger(__name__)

ANSWER_S = 10.0  # of the controller, to a look
AWAY_S = 120.0  # without an answer; Ray starts it again meanwhile
TURN_S = 0.5
HEAD = (
    "node:__internal_head__"  # what only Ray's head has, and Ray Serve's controller asks for, too
)
END_S = 60.0  # beyond twice drain_s, to drain proxies and then instances


class ClusterServer:
    """A server on a cluster, as the process sees it that was asked to serve. One thread uses it;
    `ask_stop` may be called by a signal handler."""

    def __init__(self, settings: Settings) -> None:
        """Nothing is started. Raises ConfigError where the settings cannot serve on a cluster, or
        this installation cannot."""
        assert settings.clustered is not None
        check(settings)
        ray_module()
        self._settings = msgspec.structs.replace(settings, domain=settings.domain_name)
        self._stops = 0
        self._told = 0
        self._ray: Any = None
        self._controller: Any = None
        self._members: dict[str, MemberNow] = {}

    def start(self) -> None:
        """Start the controller, or find the one that serves already. Raises ConfigError where there
        is no cluster, and where what is served is something else; ModelNotFound and what reading a
        model raises."""
        cluster = self._settings.clustered
        assert cluster is not None
        ray = self._ray = join(cluster.address)
        first, nodes = ray.get_runtime_context().get_node_id(), nodes_of(ray)
        check_addresses(self._settings, nodes)
        launch = ControllerLaunch(
            settings=self._settings,
            specs=find_models(ray, self._settings, nodes, first),
            first=first,
            kv_spare=kv_sizes(model_directories(self._settings.models_dir)),
            secret=cluster_secret(cluster.weights),
        )
        name = self.name
        actor = ray.remote(Controller).options(
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            num_cpus=0,
            # Beside Ray's own: with another node would go who sees that it is lost.
            resources={HEAD: 0.001},
        )
        self._controller = actor.remote(msgspec.json.encode(launch))
        told = msgspec.json.decode(self._ask(self._controller.launch), type=ControllerLaunch)
        if (told.settings, told.specs) != (launch.settings, launch.specs):
            raise ConfigError(
                f"{name} serves with other settings already; stop it first (interrupt its "
                "`aegaeon serve`, or run it again and interrupt that), or choose another --domain"
            )

    def ask_stop(self) -> None:
        """Drain; asked again, end at once."""
        self._stops += 1

    @property
    def name(self) -> str:
        """What its controller is called."""
        return f"aegaeon-{self._settings.domain_name}"

    @property
    def is_killed(self) -> bool:
        """Whether it was asked to end without draining."""
        return self._stops > 1

    def run(self, on_ready: Callable[[tuple[str, ...]], None]) -> None:
        """Return when the server has ended; `on_ready` is told once where it listens. Raises
        ConfigError, with why, where it could not start."""
        is_said = False
        while True:
            if self._told < self._stops:
                self._told = self._stops
                self._controller.ask_stop.remote(self._stops > 1)
            look = msgspec.json.decode(self._ask(self._controller.look), type=ControllerLook)
            self._note(look)
            if look.is_ready and not is_said:
                is_said = True
                on_ready(tuple(m.url for m in look.members if m.kind == "proxy" and m.url))
            if look.has_ended:
                self._ray.kill(self._controller, no_restart=True)
                if look.failure:
                    raise ConfigError(look.failure)
                return
            why = _hopeless(look)
            if why and not is_said and not self._stops:
                self.ask_stop()
                self.ask_stop()
                self._end_hopeless(why)
            time.sleep(TURN_S)

    def close(self) -> None:
        """Leave the cluster; what serves there stays. Idempotent."""
        if self._ray is not None:
            self._ray.shutdown()

    def _end_hopeless(self, why: str) -> None:
        """Nothing of it can start: leave nothing behind, and say why."""
        self._controller.ask_stop.remote(True)
        give_up_s = time.monotonic() + END_S
        while time.monotonic() < give_up_s:
            look = msgspec.json.decode(self._ask(self._controller.look), type=ControllerLook)
            if look.has_ended:
                break
            time.sleep(TURN_S)
        self._ray.kill(self._controller, no_restart=True)
        raise ConfigError(why)

    def _ask(self, verb: Any) -> bytes:
        """Return what the controller answers, once Ray has started it, or started it again."""
        errors = self._ray.exceptions
        give_up_s = time.monotonic() + AWAY_S
        while True:
            try:
                answer = self._ray.get(verb.remote(), timeout=ANSWER_S)
                assert isinstance(answer, bytes)
                return answer
            except (errors.RayActorError, errors.GetTimeoutError) as error:
                if time.monotonic() >= give_up_s:
                    raise InstanceLost(
                        f"the cluster's controller has not answered for {AWAY_S:.0f} s ({error}); "
                        "see `ray status` and the logs of Ray"
                    ) from None
                log.warning("controller does not answer error=%s", str(error).splitlines()[0])
                time.sleep(TURN_S)

    def _note(self, look: ControllerLook) -> None:
        """Tell what has changed."""
        members = {member.name: member for member in look.members}
        for name, member in members.items():
            if (known := self._members.get(name)) is None or known.state != member.state:
                log.info(
                    "member name=%s node=%s state=%s%s",
                    *(name, member.node[:8], member.state),
                    f" reason={member.detail}" if member.detail else "",
                )
        for name in self._members.keys() - members.keys():
            log.info("member gone name=%s", name)
        self._members = members


def _hopeless(look: ControllerLook) -> str:
    """Why no instance, or no proxy, can start, if that is so of all of them."""
    for kind in ("instance", "proxy"):
        of_kind = [member for member in look.members if member.kind == kind]
        if of_kind and all(member.state == "failed" for member in of_kind):
            return of_kind[0].detail
    return ""


def check(settings: Settings) -> None:
    """Raise ConfigError where these settings cannot serve on a cluster."""
    if settings.metadata_backend != "redis":
        raise ConfigError(
            "a cluster's nodes share no memory; give --metadata-backend redis and a --redis-url "
            "that all of them reach"
        )
    if len(settings.domain_name) > 80:
        raise ConfigError("a cluster's domain has at most 80 characters; choose another --domain")


def check_addresses(settings: Settings, nodes: tuple[NodeNow, ...]) -> None:
    """Raise ConfigError where a node cannot mean the same server by the URL of Redis as we do."""
    addresses = {node.address for node in nodes}
    place = read_place(settings.redis_url)
    own = [host for host, _ in place.servers if _is_loopback(host)]
    if len(addresses) > 1 and (place.socket or own):
        raise ConfigError(
            f"the cluster has {len(addresses)} machines, and {own[0] if own else 'a socket'} is "
            "another one on each; give a --redis-url with an address that all of them reach"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
