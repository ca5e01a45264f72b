"""What each node of a cluster is to have: pure, from its resources and labels and the settings."""

import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from aegaeon.config import Settings
from aegaeon.nodes import ClusterSettings, MemberKind, NodeNow, NodeSettings
from aegaeon.types import ModelSpec

GB = 1e9
NAME_CHARS = 8  # of a node's id, in the names of its instances


class MemberPlan(msgspec.Struct, frozen=True, kw_only=True):
    """An actor that is to be. `settings` are those of all its node's instances, of which it is the
    one with `index`, `labels` the node's; the rest is what it takes of the node."""

    name: str
    kind: MemberKind
    node: str
    settings: Settings
    index: int = 0
    cpus: float = 0.0
    gpus: float = 0.0
    gpus_shared_by: int = 1  # instances on one GPU
    memory_bytes: int = 0
    resources: dict[str, float] = {}
    labels: dict[str, str] = {}

    def may_have(self, spec: ModelSpec) -> bool:
        """Whether a model may ever live on the node, by its labels."""
        return spec.labels.items() <= self.labels.items()


def plan_members(
    settings: Settings, nodes: Sequence[NodeNow], first: str, proxies: Mapping[str, str]
) -> dict[str, MemberPlan]:
    """Return what the cluster is to have, by name: on each node the instances of its rule, and
    proxies, each where it is by `proxies` (nodes by name), else on the node `first`, else wherever
    none is. Nothing is placed on nodes that are drained."""
    cluster = settings.clustered or ClusterSettings()
    able = [node for node in nodes if not node.is_draining]
    plans = [plan for node in able for plan in _instances(settings, cluster.nodes, node)]
    plans += _proxies(settings, cluster.proxies, able, first, proxies)
    places = {node.id: models_dir_of(settings, node) for node in able}
    return {plan.name: _with_models_in(plan, places[plan.node]) for plan in plans}


def models_dir_of(settings: Settings, node: NodeNow) -> str:
    """Return where models live on `node`."""
    cluster = settings.clustered or ClusterSettings()
    rule = rule_of(cluster.nodes, node)
    return (rule.models_dir if rule is not None else "") or settings.models_dir


def staying(
    settings: Settings, nodes: Iterable[NodeNow], known: Mapping[str, str]
) -> dict[str, MemberPlan]:
    """Return the instances of `nodes` that are there already, by those `known` (nodes by name):
    they stay, though nothing is placed there any more."""
    cluster = settings.clustered or ClusterSettings()
    plans = [plan for node in nodes for plan in _instances(settings, cluster.nodes, node)]
    return {plan.name: plan for plan in plans if plan.name in known}


def rule_of(rules: Iterable[NodeSettings], node: NodeNow) -> NodeSettings | None:
    """Return the first of `rules` whose labels `node` has; None: it is to have nothing."""
    for rule in rules:
        if rule.labels.items() <= node.labels.items():
            return rule
    return None


def _with_models_in(plan: MemberPlan, models_dir: str) -> MemberPlan:
    settings = msgspec.structs.replace(plan.settings, models_dir=models_dir)
    return msgspec.structs.replace(plan, settings=settings)


def _instances(
    settings: Settings, rules: Sequence[NodeSettings], node: NodeNow
) -> list[MemberPlan]:
    rule = rule_of(rules, node)
    if rule is None:
        return []
    device = rule.device or settings.device
    is_cuda = device.startswith("cuda")
    cpus = rule.cpus or float(settings.threads_per_instance)
    count = _fitting(rule, node, cpus, _count(settings, rule, node, is_cuda))
    chosen = _with_count(settings, count)
    if chosen is None:
        return []
    count = chosen.instance_count
    cpus = cpus or _whole(node.cpus / count)
    per_gpu = math.ceil(count / node.gpus) if is_cuda else 1
    chosen = msgspec.structs.replace(
        chosen,
        # Ray shows each actor its own GPUs alone, counted from 0.
        device="cuda:0" if is_cuda else device,
        threads_per_instance=settings.threads_per_instance or math.ceil(rule.cpus),
    )
    return [
        MemberPlan(
            name=f"instance-{node.id[:NAME_CHARS]}-{index}",
            kind="instance",
            node=node.id,
            settings=chosen,
            index=index,
            cpus=cpus,
            gpus=math.floor(1e4 / per_gpu) / 1e4 if is_cuda else 0.0,
            gpus_shared_by=per_gpu,
            memory_bytes=round(rule.memory_gb * GB),
            resources=rule.resources,
            labels=node.labels,
        )
        for index in range(count)
    ]


def _count(settings: Settings, rule: NodeSettings, node: NodeNow, is_cuda: bool) -> int:
    """How many instances the rule asks for."""
    if is_cuda and not node.gpus:
        return 0
    if rule.instances:
        return rule.instances
    return node.gpus if is_cuda else settings.instance_count


def _fitting(rule: NodeSettings, node: NodeNow, cpus: float, wanted: int) -> int:
    """How many of `wanted` the node has room for."""
    if not cpus and node.cpus <= 0:
        return 0  # it is to run nothing, as heads often are
    needs = {**rule.resources, "CPU": cpus, "memory": rule.memory_gb * GB}
    rooms = [
        math.floor(node.resources.get(name, 0.0) / need) for name, need in needs.items() if need > 0
    ]
    return min(wanted, *rooms) if rooms else wanted


def _with_count(settings: Settings, count: int) -> Settings | None:
    """Return the settings of a node with `count` instances. Where roles are split only all of them
    are of use: None, if they do not fit, as where there are none."""
    if settings.prefill_count or settings.decode_count:
        return settings if count >= settings.instance_count else None
    if count < 1:
        return None
    return msgspec.structs.replace(settings, colocated_count=count)


def _whole(cpus: float) -> float:
    """Ray gives out parts of one CPU, but of more only whole ones."""
    return float(math.floor(cpus)) if cpus >= 1 else math.floor(cpus * 1e4) / 1e4


def _proxies(
    settings: Settings, count: int, nodes: Sequence[NodeNow], first: str, known: Mapping[str, str]
) -> list[MemberPlan]:
    ids = [node.id for node in nodes]
    count = min(count or len(ids), len(ids))
    names = [f"proxy-{rank}" for rank in range(count)]
    places = {name: known[name] for name in names if known.get(name) in ids}
    free = [node for node in ids if node not in places.values()]
    free.sort(key=lambda node: node != first)
    for name in names:
        if name not in places:
            places[name] = free.pop(0)
    return [
        MemberPlan(name=name, kind="proxy", node=places[name], settings=settings) for name in names
    ]
