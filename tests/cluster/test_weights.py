"""A cluster of three nodes with a models directory each, of which one has the models."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.support.checkpoints import make_checkpoint
from tests.support.polling import eventually
from tests.support.ray_cluster import ClusteredServer, ray_cluster, require_ray
from tests.support.server import Streamed, run_cli
from tests.support.sharing import assert_same

DISKS = ("a", "b", "c")
TOKENS = 60
PROMPT = "the device"
ADA, BEA, LATE = "Org__ada", "bea", "late"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that runs nothing but a proxy, and three nodes."""
    require_ray()
    with ray_cluster(*({"labels": {"disk": disk}, "num_cpus": 1} for disk in DISKS)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    make_checkpoint(root / "a" / ADA, "llama", seed=1, max_position_embeddings=4096)
    sizes = {"intermediate_size": 28000, "num_hidden_layers": 6}
    make_checkpoint(root / "a" / BEA, "qwen3", seed=2, shards=3, dtype=torch.float32, **sizes)
    make_checkpoint(root / "later" / LATE, "llama", seed=3)
    return root


def configured(root: Path) -> Path:
    """Settings in which each node has its own disk, as where they are machines; the head, too."""
    rules = ",\n".join(
        f'  {{labels = {{disk = "{disk}"}}, models_dir = "{root / disk}"}}' for disk in DISKS
    )
    path = root / "server.toml"
    path.write_text(f'models_dir = "{root / "head"}"\n[cluster]\nnodes = [\n{rules}\n]\n')
    return path


def flags_of(root: Path) -> tuple[str, ...]:
    sizes = ("--model-cache-budget-gb", "0.4", "--kv-budget-gb", "0.1", "--drain-s", "0.5")
    return ("--config", str(configured(root)), "--lease-s", "10", *sizes)


@pytest.fixture(scope="module")
def server(cluster, redis_server, root) -> Iterator[ClusteredServer]:
    models = {"ada": Path(ADA), "bea": Path(BEA)}
    where = (cluster.address, redis_server.url)
    with ClusteredServer(root, models, *where, *flags_of(root)) as server:
        yield server
    assert server.left_in_shared_memory() == []
    assert server.keys() == []


def files_of(server: ClusteredServer, disk: str) -> dict[str, Any]:
    """What the porter of the node with this disk tells."""
    status = server.status()
    node = next(n["id"] for n in status["nodes"] if n["labels"].get("disk") == disk)
    return next((one for one in status["files"] if one["node"] == node), {"held": []})


def porter_of(server: ClusteredServer, cluster: Any, disk: str) -> int:
    """The pid of the porter of that node: a child of a child of its raylet."""
    port = int(files_of(server, disk)["address"].rpartition(":")[2])
    inode = next(
        line.split()[9]
        for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
        if line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A"
    )
    for process in Path("/proc").glob("[0-9]*"):
        try:
            handles = [str(one.readlink()) for one in (process / "fd").iterdir()]
        except OSError:
            continue
        if f"socket:[{inode}]" in handles:
            return int(process.name)
    raise AssertionError(f"nobody listens at {port}")


def serving(server: ClusteredServer, model: str) -> set[str]:
    """The instances that serve it."""
    return {name for name, record in server.records().items() if model in record.models}


def test_all_nodes_come_to_serve_what_one_has_also_where_one_is_killed_midway(
    server, cluster, root
):
    eventually(lambda: files_of(server, "b").get("address"), within_s=40)
    partial = root / "b" / f".{BEA}.fetch"
    eventually(lambda: partial.is_dir() or (root / "b" / BEA).is_dir(), within_s=40)
    killed = porter_of(server, cluster, "b")
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: all(len(serving(server, one)) == 3 for one in ("ada", "bea")), within_s=90)
    for disk in ("b", "c"):
        for name in (ADA, BEA):
            assert_same(root / "a" / name, root / disk / name)
    assert not (root / "head" / BEA).exists()  # a proxy needs no weights
    assert sorted(p.name for p in (root / "head" / ".texts").iterdir()) == [ADA, BEA]
    eventually(lambda: not files_of(server, "b").get("coming"), within_s=20)
    assert porter_of(server, cluster, "b") != killed


def test_a_model_added_while_it_serves_comes_to_all(server, root):
    shutil.copytree(root / "later" / LATE, root / "head" / LATE)
    added = httpx.post(f"{server.url}/admin/models", json={"reference": LATE}, timeout=30)
    assert added.status_code == 201, added.text
    eventually(lambda: len(serving(server, LATE)) == 3, within_s=60)
    assert_same(root / "later" / LATE, root / "c" / LATE)
    assert Streamed(server.url, LATE, PROMPT, TOKENS).whole()


def test_each_node_makes_the_same_tokens_of_what_it_was_brought(server, cluster):
    nodes = {node.node_id: node for node in cluster.worker_nodes}
    seen = {model: set() for model in ("ada", "bea")}
    while len(nodes) > 1:
        for model, texts in seen.items():
            stream = Streamed(server.url, model, PROMPT, TOKENS)
            texts.add(stream.whole())
            last = stream.instances[-1]
        gone = server.records()[last].node  # who served the last one; others serve the next
        cluster.remove_node(nodes.pop(gone), allow_graceful=False)
        eventually(lambda gone=gone: all(r.node != gone for r in server.records().values()), 30)
    for model, texts in seen.items():
        texts.add(Streamed(server.url, model, PROMPT, TOKENS).whole())
        assert len(texts) == 1 and texts != {""}


def test_a_model_that_is_nowhere_is_told_at_once(cluster, redis_server, root):
    told = run_cli(
        *("serve", "--cluster", cluster.address, "--domain", "test-nowhere"),
        *("--metadata-backend", "redis", "--redis-url", redis_server.url, "--port", "0"),
        *flags_of(root),
        *("--models", "nowhere"),
    )
    assert told.returncode == 1
    assert "no model 'nowhere' is anywhere" in told.stderr
    assert "[cluster.weights] shared" in told.stderr
