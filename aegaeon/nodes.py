"""What a cluster is made of: what its nodes are to get, by the settings, and what it tells.

Only data, frozen; it stands beside types.py. Who acts by it is aegaeon/cluster.
"""

from typing import Annotated, Literal

import msgspec

from aegaeon.specs import doc

CLUSTER = "cluster"  # under which a controller tells of it, on the board
FILES = "files-"  # and a node's porter of its models, with the node's name behind it
Origin = Literal["shared", "peers", "hub"]  # of weights
MemberKind = Literal["instance", "proxy"]
MemberState = Literal["pending", "starting", "ready", "draining", "restarting", "failed", "ended"]


class NodeSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What each node of a kind gets. The first of the settings' whose labels a node has holds."""

    labels: Annotated[dict[str, str], doc("labels that a node must have (default: none)")] = {}
    instances: Annotated[
        int,
        doc("instances on each (0: as the counts say, on GPUs one for each)", ge=0, le=1024),
    ] = 0
    device: Annotated[
        str, doc("what they compute on: cpu, staged, null, or cuda (default: as --device)")
    ] = ""
    cpus: Annotated[
        float, doc("CPUs that an instance takes (0: the node's, shared out)", ge=0, le=4096)
    ] = 0.0
    memory_gb: Annotated[
        float, doc("memory that an instance takes of the node's, GB (0: not counted)", ge=0)
    ] = 0.0
    resources: Annotated[
        dict[str, float], doc("what else an instance takes of a node (default: nothing)")
    ] = {}
    models_dir: Annotated[
        str, doc("where models live there (default: as --models-dir, by each node's own home)")
    ] = ""


class WeightsSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How models come to nodes that lack them."""

    order: Annotated[
        tuple[Origin, ...],
        doc(
            "whom a node asks for a model that it lacks, one after the other: shared directories, "
            "nodes that have it, the hub; who is left out is not asked"
        ),
    ] = ("shared", "peers", "hub")
    shared: Annotated[
        tuple[str, ...],
        doc("models directories on file systems that nodes share, from which they copy"),
    ] = ()
    port: Annotated[
        int, doc("port at which each node gives others its models (0: any)", ge=0, le=65535)
    ] = 0
    secret_file: Annotated[
        str,
        doc(
            "what nodes prove to each other that they know, read where `aegaeon serve` runs "
            "(default: the cluster makes a secret of its own)"
        ),
    ] = ""


class ClusterSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A cluster of Ray on which to serve, instead of this machine alone."""

    address: Annotated[
        str, doc("of the cluster, or auto: the one that this machine is of", min_length=1)
    ] = "auto"
    proxies: Annotated[
        int, doc("nodes that listen, the one of `aegaeon serve` first (0: all)", ge=0, le=1024)
    ] = 1
    nodes: Annotated[
        tuple[NodeSettings, ...],
        doc("what nodes get, by their labels (default: each the same, by --device and the counts)"),
    ] = (NodeSettings(),)
    replicas: Annotated[
        int,
        doc(
            "nodes that serve each model at least, and more by its load (0: all nodes, where each "
            "has room for all models; else 1)",
            ge=0,
            le=10_000,
        ),
    ] = 0
    rebalance_s: Annotated[
        float, doc("between two looks at where models live (0: only when nodes change)", ge=0)
    ] = 60.0
    most_moves: Annotated[
        int, doc("models that leave a crowded node in one such look", ge=1, le=10_000)
    ] = 8
    weights: Annotated[WeightsSettings, doc("how models come to nodes that lack them")] = (
        WeightsSettings()
    )


class NodeNow(msgspec.Struct, frozen=True, kw_only=True):
    """A node as Ray describes it. `memory_bytes` are those that Ray gives out."""

    id: str
    address: str
    labels: dict[str, str] = {}
    resources: dict[str, float] = {}
    is_draining: bool = False

    @property
    def cpus(self) -> float:
        """CPUs that Ray gives out."""
        return self.resources.get("CPU", 0.0)

    @property
    def gpus(self) -> int:
        """GPUs that Ray gives out."""
        return int(self.resources.get("GPU", 0.0))

    @property
    def memory_bytes(self) -> int:
        """Memory that Ray gives out."""
        return int(self.resources.get("memory", 0.0))


class MemberNow(msgspec.Struct, frozen=True, kw_only=True):
    """An actor of the cluster: an instance or a proxy. `restarts` are those of its process and of
    its actor; `url` is where a proxy listens; `detail` says why it is not ready, where known."""

    name: str
    kind: MemberKind
    node: str
    state: MemberState
    restarts: int = 0
    url: str = ""
    detail: str = ""


class ClusterFigures(msgspec.Struct, tag="cluster", kw_only=True, omit_defaults=True):
    """What the controller of a cluster publishes, `beats` times so far. `levels` are how busy each
    node's devices are to be with the models that live there, by the last look at the load."""

    beats: int = 0
    nodes: tuple[NodeNow, ...] = ()
    members: tuple[MemberNow, ...] = ()
    levels: dict[str, float] = {}


class Coming(msgspec.Struct, frozen=True, omit_defaults=True):
    """A model on its way to a node: bytes that are there, of all, or why it does not come, and in
    how many seconds it is tried again."""

    done_bytes: int = 0
    total_bytes: int = 0
    failure: str = ""
    again_s: float = 0.0

    @property
    def share(self) -> float:
        """What part of it is there."""
        return self.done_bytes / self.total_bytes if self.total_bytes else 0.0


class NodeFiles(msgspec.Struct, tag="files", kw_only=True, omit_defaults=True):
    """What the porter of a node publishes, `beats` times so far: where other nodes get models from
    it (HOST:PORT), which it has, by the names of their directories, and which come to it, by their
    ids."""

    node: str
    address: str
    beats: int = 0
    held: tuple[str, ...] = ()
    coming: dict[str, Coming] = {}
