"""The command `aegaeon status`: the nodes, instances and models of a running server, once."""

import argparse
import json
from collections.abc import Iterator, Sequence

import msgspec
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from aegaeon.client import URL
from aegaeon.config import api_key
from aegaeon.flags import Parser
from aegaeon.nodes import MemberNow
from aegaeon.proxy.status import InstanceNow, ModelNow, Status
from aegaeon.top import fetch

EXAMPLES = """\
examples:
  aegaeon status
  aegaeon status --url http://10.0.0.7:8080 --json | jq '.members[] | {name, node, state}'

A lease is what is left of it: an instance whose lease ends is gone. The replicas of a model are
the instances whose devices have it now. Without a cluster there is no table of nodes; in one, a
model lives on some of them, where its requests go: (ID) serves it soon, ID* until others do. Busy
is what part of its devices' time a node is to need for the models that live there.
exit codes: 0 shown, 1 no server there, 2 wrong usage"""

NUMBERS = {
    *("CPUs", "GPUs", "memory GB", "instances", "replicas", "waiting", "running", "lease s"),
    *("restarts", "models", "busy", "files", "there GB", "of GB"),
}
ID_CHARS = 8  # of a node's id, as in the names of its instances
STILL_THERE = ("ready", "draining")
RULES = {
    "everywhere": "each node has room for all models, so all have all",
    "load": "models have nodes by their load, and by the room there is",
}
# Why the place of a model changed last.
WHY = {
    "everywhere": "all nodes hold all",
    "new": "it came",
    "lost": "a node was lost",
    "refused": "a node refused it",
    "refused_by_all": "every node refuses it",
    "busier": "it got busier",
    "crowded": "its node was too busy",
    "idle": "fewer do",
    "room": "for want of room",
    "moved": "its node was too busy",
    "unwanted": "its node may not have it",
    "no_labels": "no node has its labels",
    "too_large": "too large for any device",
}


def status_command(given: Sequence[str]) -> Iterator[RenderableType]:
    """Yield what is to be printed. Raises ConfigError, StoreUnavailable."""
    parser = Parser(
        prog="aegaeon status",
        description="Show what a server is made of: its nodes, instances and models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", default=URL, help=f"of the server (default: {URL})")
    parser.add_argument("--key", default="", help="an API key that may look (or AEGAEON_API_KEY)")
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    options = parser.parse_args(given)
    status = fetch(options.url, options.key or api_key())
    if options.json:
        yield json.dumps(msgspec.to_builtins(status), indent=2)
        return
    yield from pictures(status)


def pictures(status: Status) -> Iterator[Table]:
    """Yield the tables: of nodes where there are any, of members, of models, of what comes."""
    if status.nodes:
        yield _nodes(status)
    yield _members(status)
    models = _models(status)
    models.caption = RULES.get(status.placement)
    models.caption_justify = "left"
    yield models
    if any(one.coming for one in status.files):
        yield _coming(status)


def _nodes(status: Status) -> Table:
    columns = ("node", "address", "state", "CPUs", "GPUs", "memory GB", "instances")
    table = _table(*columns, "models", "files", "busy", "labels")
    held = {one.node: str(len(one.held)) for one in status.files}
    for node in status.nodes:
        level = status.levels.get(node.id)
        instances = [m for m in status.members if m.node == node.id and m.kind == "instance"]
        ready = sum(member.state == "ready" for member in instances)
        labels = sorted(f"{k}={v}" for k, v in node.labels.items() if not k.startswith("ray.io/"))
        table.add_row(
            node.id[:ID_CHARS],
            node.address,
            _state("draining" if node.is_draining else "alive", "alive"),
            f"{node.cpus:g}",
            str(node.gpus),
            f"{node.memory_bytes / 1e9:.1f}",
            f"{ready}/{len(instances)}",
            str(sum(node.id in model.nodes for model in status.models)),
            held.get(node.id, "-"),
            "-" if level is None else f"{level:.0%}",
            ", ".join(labels) or "-",
        )
    return table


def _members(status: Status) -> Table:
    """A row for each instance, and each proxy of a cluster, alive or on its way."""
    numbers = ("waiting", "running", "lease s", "restarts")
    table = _table("name", "node", "state", "device", "models on it", *numbers, "where or why")
    alive = {one.id: one for one in status.instances}
    known = {member.name for member in status.members}
    for one in status.instances:
        if one.id not in known:
            _add(table, MemberNow(name=one.id, kind="instance", node=one.node, state="ready"), one)
    for member in status.members:
        _add(table, member, alive.get(member.name))
    return table


def _add(table: Table, member: MemberNow, one: InstanceNow | None) -> None:
    state = member.state if one is None or member.state not in STILL_THERE else one.state
    restarts = max(member.restarts, one.restarts if one is not None else 0)
    row: list[str | Text] = [member.name, member.node[:ID_CHARS] or "-", _state(state, "ready")]
    if one is None:
        row += ["-"] * 5
    else:
        left_s = one.lease_left_s
        row += [one.device, ", ".join(one.resident) or "-", str(one.waiting), str(one.running)]
        row += ["-" if left_s is None else f"{left_s:.1f}"]
    table.add_row(*row, str(restarts), member.url or member.detail or "-")


def _models(status: Status) -> Table:
    columns = ("model", "is", "tier", "replicas", "waiting", "running", "on")
    table = _table(*columns, *(("lives on", "because") if status.placement else ()))
    for model in status.models:
        places = [one.id for one in status.instances if model.id in one.resident]
        home = (_home(model), WHY.get(model.placed, model.placed) or "-")
        table.add_row(
            model.id,
            model.status,
            model.tier,
            str(model.replicas),
            str(model.waiting),
            str(model.running),
            ", ".join(places) or "-",
            *(home if status.placement else ()),
        )
    return table


def _home(model: ModelNow) -> str:
    """The nodes of a model: in brackets those that do not serve it yet."""
    nodes = [
        node[:ID_CHARS] if node in model.serving else f"({node[:ID_CHARS]})" for node in model.nodes
    ]
    return ", ".join((*nodes, *(f"{node[:ID_CHARS]}*" for node in model.leaving))) or "-"


def _coming(status: Status) -> Table:
    """A row for each model on its way to a node."""
    table = _table("model to come", "to node", "there GB", "of GB", "or why not")
    for files in status.files:
        for model, one in files.coming.items():
            again = f"again in {one.again_s:.0f} s: " if one.again_s else ""
            table.add_row(
                model,
                files.node[:ID_CHARS],
                f"{one.done_bytes / 1e9:.3f}",
                f"{one.total_bytes / 1e9:.3f}" if one.total_bytes else "-",
                f"{again}{one.failure}" if one.failure else "-",
            )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in NUMBERS else "left")
    return table


def _state(state: str, good: str) -> Text:
    return Text(state, style="" if state == good else "red")
