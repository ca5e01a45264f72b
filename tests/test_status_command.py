"""The tables of `aegaeon status`, of a cluster and of one machine."""

import msgspec
from rich.console import Console

from aegaeon.nodes import Coming, MemberNow, NodeFiles, NodeNow
from aegaeon.proxy.status import InstanceNow, ModelNow, Quantiles, Status
from aegaeon.status_command import pictures

UNKNOWN = Quantiles(None, None)
NODES = (
    NodeNow(
        id="a" * 20,
        address="10.0.0.1",
        labels={"pool": "big", "ray.io/node-id": "a"},
        resources={"CPU": 8.0, "GPU": 2.0, "memory": 64e9},
    ),
    NodeNow(id="b" * 20, address="10.0.0.2", is_draining=True),
)


def make_instance(name: str, node: str = "", **changes) -> InstanceNow:
    return InstanceNow(
        **{
            **{"id": name, "state": "ready", "role": "colocated", "device": "cpu", "node": node},
            **{"current": "ada", "loading": None, "resident": ("ada",), "waiting": 1, "running": 2},
            **{"switches": 0, "restarts": 3, "stall_s": 0.0, "weight_bytes": 0},
            **{"weight_budget_bytes": 0, "kv_bytes": 0, "kv_budget_bytes": 0},
            **changes,
        }
    )


def make_status(*instances: InstanceNow, **changes) -> Status:
    ada = ModelNow(
        id="ada",
        status="running",
        tier="device",
        waiting=1,
        running=2,
        oldest_wait_s=0.0,
        ttft_s=UNKNOWN,
        tbt_s=UNKNOWN,
        slo_ttft_s=10.0,
        slo_tbt_s=0.1,
        tokens_per_s=0.0,
        finished=0,
        failed=0,
        attained=None,
        replicas=len(instances),
    )
    return Status(
        open_requests=3, slo_ttft_s=10, slo_tbt_s=0.1, instances=instances, models=(ada,), **changes
    )


def with_model(status: Status, **changes) -> Status:
    """Return `status` with its model changed."""
    (model,) = status.models
    return msgspec.structs.replace(status, models=(msgspec.structs.replace(model, **changes),))


def shown(status: Status) -> list[list[str]]:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    with console.file:
        for table in pictures(status):
            console.print(table)
    return [line.split() for line in console.export_text().splitlines()]


def test_one_machine_has_instances_and_models():
    lines = shown(make_status(make_instance("instance-0")))
    assert lines[1][:4] == ["instance-0", "-", "ready", "cpu"]
    assert lines[1][4:9] == ["ada", "1", "2", "-", "3"]
    assert lines[3] == ["ada", "running", "device", "1", "1", "2", "instance-0"]
    assert len(lines) == 4


def test_a_cluster_has_nodes_and_members_that_are_not_there_yet():
    kind = {"kind": "instance", "node": "a" * 20}
    members = (
        MemberNow(name="instance-a-0", **kind, state="ready", restarts=1),
        MemberNow(name="instance-a-1", **kind, state="failed", detail="no room"),
        MemberNow(name="proxy-0", kind="proxy", node="b" * 20, state="ready", url="http://b:1"),
    )
    one = make_instance("instance-a-0", "a" * 20, lease_left_s=7.25, restarts=0)
    levels = {"a" * 20: 0.42}
    status = make_status(one, nodes=NODES, members=members, placement="load", levels=levels)
    files = (NodeFiles(node="a" * 20, address="10.0.0.1:4711", held=("ada",)),)
    status = msgspec.structs.replace(status, files=files)
    placed = {"nodes": ("a" * 20,), "serving": ("a" * 20,), "placed": "crowded"}
    lines = shown(with_model(status, **placed))
    assert " ".join(lines[1]) == "aaaaaaaa 10.0.0.1 alive 8 2 64.0 1/2 1 1 42% pool=big"
    assert lines[2] == [
        "bbbbbbbb",
        "10.0.0.2",
        "draining",
        "0",
        "0",
        "0.0",
        "0/0",
        "0",
        "-",
        "-",
        "-",
    ]
    assert lines[4][:9] == [
        *("instance-a-0", "aaaaaaaa", "ready", "cpu", "ada", "1", "2", "7.2", "1")
    ]
    assert lines[5][1:3] == ["aaaaaaaa", "failed"] and lines[5][-2:] == ["no", "room"]
    assert lines[6][1:3] == ["bbbbbbbb", "ready"] and lines[6][-1] == "http://b:1"
    assert " ".join(lines[8]).endswith("aaaaaaaa its node was too busy")
    assert " ".join(lines[9]) == "models have nodes by their load, and by the room there is"


def test_a_model_on_its_way_shows_where_from_and_why():
    there, coming = "a" * 20, "b" * 20
    placed = {"nodes": (coming,), "leaving": (there,), "serving": (there,), "placed": "lost"}
    lines = shown(with_model(make_status(make_instance("i", there), placement="load"), **placed))
    assert " ".join(lines[3]).endswith("(bbbbbbbb), aaaaaaaa* a node was lost")


def test_what_comes_to_a_node_is_shown_with_why_something_does_not():
    coming = {
        "ada": Coming(250_000_000, 1_000_000_000),
        "bea": Coming(failure="no room is left; free some", again_s=29.6),
    }
    files = (NodeFiles(node="a" * 20, address="10.0.0.1:4711", coming=coming),)
    lines = shown(make_status(make_instance("instance-0"), files=files))
    ada, bea = lines[-2:]
    assert ada == ["ada", "aaaaaaaa", "0.250", "1.000", "-"]
    assert " ".join(bea).endswith("- again in 30 s: no room is left; free some")
