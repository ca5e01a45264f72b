"""The porters of two nodes, as processes of this machine: models come to who lacks them."""

import itertools
import os
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from aegaeon.cluster.porters import PorterPost, cluster_secret
from aegaeon.config import check_settings
from aegaeon.errors import ConfigError
from aegaeon.figures import decode_figures, encode_figures
from aegaeon.models.here import TEXTS, for_all_nodes
from aegaeon.models.references import describe_model
from aegaeon.nodes import FILES, ClusterFigures, MemberNow, NodeFiles, NodeNow, WeightsSettings
from aegaeon.specs import Catalog
from aegaeon.store.domains import open_domain
from aegaeon.transfer.manifest import CHUNK_BYTES
from aegaeon.types import InstanceRecord, InstanceStatus
from tests.support.checkpoints import make_checkpoint
from tests.support.polling import eventually
from tests.support.server import is_running
from tests.support.sharing import SECRET, assert_same, make_large, sharing
from tests.support.wire import Wire

NODES = ("a" * 40, "b" * 40)
LEASE_S = 60.0


def settings_of(root: Path, domain: str, **weights):
    table = {"address": "auto", "weights": weights}
    return check_settings({"cluster": table, "models_dir": str(root), "domain": domain})


class Nodes:
    """A domain of two nodes, of which the first has the models."""

    def __init__(self, root: Path):
        self.name = f"test-porters-{os.getpid()}-{time.monotonic_ns()}"
        self.roots = {node: root / node[0] for node in NODES}
        self.domain = open_domain(settings_of(root, self.name))
        self.board = self.domain.board()

    def serve(self, *names, node=NODES[1], device="cpu"):
        """Have instances on `node`, and models of the first node served."""
        record = InstanceRecord(
            id=f"instance-{node[0]}", incarnation=1, role="colocated", device=device,
            mailbox="m", pid=1, models=(), node=node,
        )  # fmt: skip
        rows = self.domain.metadata()
        rows.register_instance(record, LEASE_S)
        rows.update_instance_status(record.id, 1, InstanceStatus())
        root = self.roots[NODES[0]]
        specs = tuple(for_all_nodes(describe_model(root / name), root) for name in names)
        self.domain.catalog().change(lambda _: Catalog(models=specs))

    def tell(self, *kinds, node=NODES[1]):
        """Say of which kinds `node` has members."""
        members = tuple(MemberNow(name=k, kind=k, node=node, state="ready") for k in kinds)
        nodes = tuple(NodeNow(id=node, address="127.0.0.1") for node in NODES)
        self.board.publish("cluster", encode_figures(ClusterFigures(nodes=nodes, members=members)))

    @contextmanager
    def porter(self, node, secret=SECRET, **weights):
        settings = settings_of(self.roots[node], self.name, **weights)
        post = PorterPost(settings, node, "127.0.0.1", secret)
        post.start()
        try:
            yield post
        finally:
            post.close()

    def files(self, node) -> NodeFiles:
        record = self.board.read().get(f"{FILES}{node[:12]}")
        return decode_figures(record) if record else NodeFiles(node=node, address="")

    def why(self, model, node=NODES[1]):
        coming = self.files(node).coming.get(model)
        return "" if coming is None else coming.failure

    def came(self, name, node=NODES[1]):
        return (self.roots[node] / name).is_dir()

    def close(self):
        self.board.close()
        self.domain.unlink()
        self.domain.close()


@pytest.fixture
def nodes(tmp_path):
    nodes = Nodes(tmp_path)
    yield nodes
    nodes.close()


def test_models_come_to_the_node_that_lacks_them(nodes):
    make_large(nodes.roots[NODES[0]] / "Org__large")
    make_checkpoint(nodes.roots[NODES[0]] / "small")
    with nodes.porter(NODES[0]), nodes.porter(NODES[1]):
        nodes.tell("instance", "proxy")
        nodes.serve("Org__large", "small")
        eventually(lambda: nodes.came("Org__large") and nodes.came("small"), within_s=60)
        eventually(lambda: sorted(nodes.files(NODES[1]).held) == ["Org/large", "small"], 30)
        eventually(lambda: nodes.files(NODES[1]).coming == {}, within_s=30)
        # What a proxy needs came by itself, and before the weights.
        assert (nodes.roots[NODES[1]] / TEXTS / "Org__large" / "tokenizer.json").is_file()
    for name in ("Org__large", "small"):
        assert_same(*(nodes.roots[node] / name for node in NODES))


@pytest.mark.thorough
def test_a_porter_killed_midway_is_started_again_and_goes_on_where_it_was(nodes):
    large = make_large(nodes.roots[NODES[0]] / "Org__large")
    size = sum(path.stat().st_size for path in large.iterdir())
    with sharing(nodes.roots[NODES[0]]) as share, nodes.porter(NODES[1]) as post:
        wire, beats = Wire(share.port, trickle), itertools.count(1)

        def share_there():
            told = NodeFiles(
                node=NODES[0], address=wire.address, beats=next(beats), held=("Org/large",)
            )
            nodes.board.publish(FILES + NODES[0][:12], encode_figures(told))
            now = nodes.files(NODES[1]).coming.get("Org/large")
            return 0.0 if now is None else now.share

        nodes.serve("Org__large")
        eventually(lambda: share_there() > 0.3, within_s=60)
        killed, before = post.pid, wire.carried
        os.kill(killed, signal.SIGKILL)
        eventually(lambda: share_there() >= 0 and nodes.came("Org__large"), within_s=90)
        assert post.pid not in (None, killed)
        wire.close()
    assert not is_running(killed)
    assert wire.carried - before < size - CHUNK_BYTES  # not all of it twice
    assert_same(large, nodes.roots[NODES[1]] / "Org__large")


def trickle(_, data):
    time.sleep(0.02 * len(data) / (1 << 16))
    return data


def test_a_node_without_instances_gets_no_weights(nodes):
    make_checkpoint(nodes.roots[NODES[0]] / "small")
    with nodes.porter(NODES[0]), nodes.porter(NODES[1]):
        nodes.tell("proxy")
        nodes.serve("small", node=NODES[0])
        texts = nodes.roots[NODES[1]] / TEXTS / "small"
        eventually(texts.is_dir, within_s=30)
        assert not list(texts.glob("*.safetensors"))
        assert (texts / "tokenizer.json").is_file()
        assert not nodes.came("small")


def test_who_does_not_know_the_secret_gets_nothing_and_says_so(nodes):
    make_checkpoint(nodes.roots[NODES[0]] / "small")
    with nodes.porter(NODES[0]), nodes.porter(NODES[1], secret=b"some other secret of 16 or more"):
        nodes.serve("small")
        eventually(lambda: "secret" in nodes.why("small"), within_s=30)
        assert not nodes.came("small")


def test_a_shared_directory_goes_first_and_is_enough(nodes, tmp_path):
    make_checkpoint(nodes.roots[NODES[0]] / "small")
    with nodes.porter(NODES[1], order=["shared"], shared=[str(nodes.roots[NODES[0]])]):
        nodes.serve("small")
        eventually(lambda: nodes.came("small"), within_s=30)


def test_another_model_of_that_name_is_told_and_left_alone(nodes):
    make_checkpoint(nodes.roots[NODES[0]] / "small")
    make_checkpoint(nodes.roots[NODES[1]] / "small", num_hidden_layers=3)
    with nodes.porter(NODES[1]):
        nodes.serve("small")
        eventually(lambda: "move it away" in nodes.why("small"), within_s=30)
        assert nodes.files(NODES[1]).held == ()
        shutil.move(nodes.roots[NODES[1]] / "small", nodes.roots[NODES[1]] / "other")
        with nodes.porter(NODES[0]):
            eventually(lambda: nodes.came("small"), within_s=60)


def test_of_two_members_of_a_node_one_has_its_porter_and_the_other_when_that_ends(nodes):
    with nodes.porter(NODES[0]) as first:
        eventually(lambda: first.pid)
        with nodes.porter(NODES[0]) as second:
            eventually(lambda: nodes.files(NODES[0]).beats, within_s=30)
            assert second.pid is None
            pid = first.pid
            first.close()
            assert not is_running(pid)
            eventually(lambda: second.pid)
        assert second.pid is None


def test_a_secret_is_made_or_read_and_never_shown(tmp_path, nodes):
    made = cluster_secret(WeightsSettings())
    assert len(made) >= 16 and made != cluster_secret(WeightsSettings())
    path = tmp_path / "secret"
    path.write_bytes(SECRET)
    assert cluster_secret(WeightsSettings(secret_file=str(path))) == SECRET
    with pytest.raises(ConfigError, match="head -c 32"):
        cluster_secret(WeightsSettings(secret_file=str(tmp_path / "none")))
    with nodes.porter(NODES[0]) as post:
        eventually(lambda: post.pid)
        shown = Path(f"/proc/{post.pid}/cmdline").read_bytes()
        shown += Path(f"/proc/{post.pid}/environ").read_bytes()
        assert SECRET not in shown and b"porter" in shown
        assert SECRET.decode() not in repr(post._launch)
        eventually(lambda: nodes.files(NODES[0]).beats, within_s=30)
        assert SECRET not in b"".join(nodes.board.read().values())
