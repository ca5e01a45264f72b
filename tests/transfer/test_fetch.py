"""A model comes to a node: whole, once, checked, whatever happens on the way."""

import os
import shutil
import threading

import pytest

from aegaeon.errors import ConfigError, ModelNotFound, TransferError, UnsupportedModel
from aegaeon.models import hub
from aegaeon.models.references import list_models, resolve
from aegaeon.transfer import bring, wire
from aegaeon.transfer.digests import digest_directory, kept
from aegaeon.transfer.fetch import Sources, fetch
from aegaeon.transfer.manifest import CHUNK_BYTES, HeldFile, Manifest
from aegaeon.transfer.wire import AskManifest, Data, Refused
from tests.support.checkpoints import make_checkpoint
from tests.support.sharing import SECRET, assert_same, liar, make_large, sharing
from tests.support.wire import Wire


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """The models directory of a node that has Org/large."""
    root = tmp_path_factory.mktemp("held")
    make_large(root / "Org__large")
    return root


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Sources are asked again at once."""
    monkeypatch.setattr(bring, "FIRST_WAIT_S", 0.01)


@pytest.fixture
def node(held):
    with sharing(held) as share:
        yield share


def from_peers(*addresses, **options):
    places = tuple(one if isinstance(one, str) else f"127.0.0.1:{one.port}" for one in addresses)
    return Sources(peers=places, secret=SECRET, has_hub=False, **options)


def total_bytes(held):
    return digest_directory(held / "Org__large", lambda *_: None, threading.Event()).manifest


def test_a_model_comes_whole_and_may_be_shared_on_without_reading_it(held, node, tmp_path):
    seen = []
    path = fetch("Org/large", tmp_path, from_peers(node), lambda *done: seen.append(done))
    assert path == tmp_path / "Org__large"
    assert_same(held / "Org__large", path)
    assert resolve("Org/large", tmp_path).id == "Org/large"
    assert [entry.id for entry in list_models(tmp_path)] == ["Org/large"]
    assert seen[-1][0] == seen[-1][1] == total_bytes(held).total_bytes
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert kept(path).manifest == kept(held / "Org__large").manifest
    assert [p.name for p in tmp_path.iterdir()] == ["Org__large"]


def test_a_model_that_is_here_is_not_asked_for(held):
    path = fetch("Org/large", held, from_peers("127.0.0.1:1"))
    assert path == held / "Org__large"


def test_what_came_before_a_break_does_not_come_again(held, node, tmp_path):
    total = total_bytes(held).total_bytes
    end = total - CHUNK_BYTES // 2  # when at least two of six parts are whole
    most = Wire(node.port, lambda before, data: None if before > end else data)
    with pytest.raises(TransferError, match="the connection ended"):
        fetch("Org/large", tmp_path, from_peers(most.address))
    most.close()
    assert list_models(tmp_path) == ()
    whole = Wire(node.port)
    fetch("Org/large", tmp_path, from_peers(whole.address))
    whole.close()
    assert_same(held / "Org__large", tmp_path / "Org__large")
    assert whole.carried < total - CHUNK_BYTES


def test_what_was_damaged_on_this_disk_comes_again(held, node, tmp_path):
    partial = tmp_path / ".Org__large.fetch"
    shutil.copytree(held / "Org__large", partial)
    (partial / "left_by_others.json").write_text("{}")
    weights = partial / "model-00002-of-00002.safetensors"
    with weights.open("r+b") as file:
        file.seek(CHUNK_BYTES + 5)
        byte = file.read(1)[0]
        file.seek(CHUNK_BYTES + 5)
        file.write(bytes([byte ^ 1]))
    counted = Wire(node.port)
    fetch("Org/large", tmp_path, from_peers(counted.address))
    counted.close()
    assert_same(held / "Org__large", tmp_path / "Org__large")
    assert CHUNK_BYTES < counted.carried < CHUNK_BYTES + 20_000


def test_connections_that_break_now_and_then_delay_and_no_more(held, node, tmp_path):
    breaks = [10_000_000, 20_000_000, 30_000_000]

    def fault(before, data):
        if breaks and before > breaks[0]:
            breaks.pop(0)
            return None
        return data

    broken = Wire(node.port, fault)
    fetch("Org/large", tmp_path, from_peers(broken.address))
    broken.close()
    assert not breaks
    assert_same(held / "Org__large", tmp_path / "Org__large")


def test_a_part_damaged_on_the_wire_comes_again(held, node, tmp_path):
    flips = [12_000_000]

    def fault(before, data):
        if flips and before > flips[0]:
            flips.pop()
            return bytes([data[0] ^ 0x80]) + data[1:]
        return data

    noisy = Wire(node.port, fault)
    fetch("Org/large", tmp_path, from_peers(noisy.address))
    noisy.close()
    assert not flips
    assert_same(held / "Org__large", tmp_path / "Org__large")


def damaged_copy(held, root, places):
    """A node whose disk changed bytes without a trace after their digests were computed."""
    shutil.copytree(held / "Org__large", root / "Org__large")
    digest_directory(root / "Org__large", lambda *_: None, threading.Event())
    for name, offset in places:
        path = root / "Org__large" / name
        status = path.stat()
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(b"rotten")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return root


def test_parts_damaged_on_one_disk_come_from_another(held, tmp_path):
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    one = damaged_copy(held, tmp_path / "a", [(first, 100)])
    two = damaged_copy(held, tmp_path / "b", [(second, 100)])
    with sharing(one) as a:
        with pytest.raises(TransferError, match=f"a part of '{first}' came damaged"):
            fetch("Org/large", tmp_path / "c", from_peers(a))
        shutil.rmtree(tmp_path / "c")
        with sharing(two) as b:
            fetch("Org/large", tmp_path / "c", from_peers(a, b))
    assert_same(held / "Org__large", tmp_path / "c" / "Org__large")


def test_a_node_that_says_nothing_more_holds_nobody_up(held, node, tmp_path, monkeypatch):
    monkeypatch.setattr(wire, "IDLE_S", 1.0)
    over, held_up = threading.Event(), threading.Event()

    def fault(before, data):
        if before > 5_000_000:
            held_up.set()
            over.wait(300)
        return data

    stalled = Wire(node.port, fault)
    fetch("Org/large", tmp_path, from_peers(stalled.address, node))
    assert held_up.is_set()  # and is still
    over.set()
    stalled.close()
    assert_same(held / "Org__large", tmp_path / "Org__large")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "a model of 0 files"),
        ((HeldFile("../evil.json", 0),), "which no model may have"),
        ((HeldFile(".digests", 0),), "which no model may have"),
        ((HeldFile("run.py", 0),), "which no model may have"),
        ((HeldFile("a.json", 0), HeldFile("a.json", 0)), "or twice"),
        ((HeldFile("a.json", -1),), "said to take -1 bytes"),
        ((HeldFile("a.safetensors", 1 << 50),), "said to take"),
        ((HeldFile("a.json", 5),), "without the digests"),
        ((HeldFile("a\0.json", 0),), "which no model may have"),
        ((HeldFile("a" * 300 + ".json", 0),), "which no model may have"),
    ],
)
def test_what_a_node_tells_of_its_files_is_not_believed(files, message, tmp_path):
    def answer(line, _question):
        line.send(Manifest(files))

    with liar(answer) as address, pytest.raises(TransferError, match=message):
        fetch("Org/large", tmp_path, from_peers(address))
    assert [path.name for path in tmp_path.rglob("*")] == []


@pytest.mark.parametrize("lie", ["short", "long", "other", "refused"])
def test_a_node_that_lies_about_its_content_is_left(lie, held, node, tmp_path):
    manifest = total_bytes(held)

    def answer(line, question):
        if isinstance(question, AskManifest):
            return line.send(manifest)
        size = min(
            CHUNK_BYTES,
            next(f.file_bytes for f in manifest.files if f.name == question.file)
            - question.index * CHUNK_BYTES,
        )
        if lie == "refused":
            return line.send(Refused("failed", "not today"))
        size += {"short": -1, "long": 1, "other": 0}[lie]
        line.send(Data(size))
        line._socket.sendall(bytes(size))
        return None

    with liar(answer) as address:
        with pytest.raises(TransferError, match=r"came damaged|another size|not today"):
            fetch("Org/large", tmp_path / "alone", from_peers(address))
        fetch("Org/large", tmp_path / "both", from_peers(address, node))
    assert_same(held / "Org__large", tmp_path / "both" / "Org__large")


def test_of_two_contents_the_wanted_one_is_taken(held, node, tmp_path):
    other = make_large(tmp_path / "other" / "Org__large", seed=1)
    with sharing(tmp_path / "other") as second:
        fetch("Org/large", tmp_path / "a", from_peers(second, node))
        assert_same(other, tmp_path / "a" / "Org__large")
        wanted = from_peers(second, node, digest=total_bytes(held).digest)
        fetch("Org/large", tmp_path / "b", wanted)
        assert_same(held / "Org__large", tmp_path / "b" / "Org__large")
        nobody = from_peers(second, node, digest="0" * 64)
        with pytest.raises(TransferError, match="it has another content"):
            fetch("Org/large", tmp_path / "c", nobody)


def test_content_changed_under_way_comes_as_it_is_by_then(held, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(held / "Org__large", source / "Org__large")
    other = make_large(tmp_path / "new", seed=1)
    with sharing(source) as share:

        def fault(before, data):
            if before > 20_000_000 and not is_changed.is_set():
                is_changed.set()
                for path in other.iterdir():
                    shutil.copyfile(path, source / "Org__large" / path.name)
            return data

        is_changed = threading.Event()
        changing = Wire(share.port, fault)
        fetch("Org/large", tmp_path / "target", from_peers(changing.address))
        changing.close()
    assert is_changed.is_set()
    assert_same(other, tmp_path / "target" / "Org__large")


def test_a_shared_path_comes_before_nodes_and_is_copied(held, tmp_path):
    sources = Sources(shared_dirs=("/nowhere", str(held)), peers=("127.0.0.1:1",), has_hub=False)
    fetch("Org/large", tmp_path, sources)
    assert_same(held / "Org__large", tmp_path / "Org__large")
    (held / "Org__large" / ".digests").unlink(missing_ok=True)
    fetch("Org/large", tmp_path / "b", sources)
    assert_same(held / "Org__large", tmp_path / "b" / "Org__large")
    assert kept(tmp_path / "b" / "Org__large").manifest == total_bytes(held)


def test_all_that_was_tried_is_told(node, tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    sources = Sources(
        shared_dirs=(str(tmp_path / "nfs"),),
        peers=("127.0.0.1:1", f"127.0.0.1:{node.port}"),
        secret=SECRET,
    )
    with pytest.raises(TransferError) as caught:
        fetch("Org/none", tmp_path, sources)
    text = str(caught.value)
    for part in ("is not there", "nfs", "127.0.0.1:1: Connection refused", "has no such model"):
        assert part in text
    assert "the hub: cannot download Org/none" in text


def test_who_does_not_know_the_secret_gets_nothing(node, tmp_path):
    sources = Sources(peers=(f"127.0.0.1:{node.port}",), secret=b"x" * 32, has_hub=False)
    with pytest.raises(TransferError, match="connection ended"):
        fetch("Org/large", tmp_path, sources)
    with (
        sharing(tmp_path / "none", secret=b"y" * 32) as impostor,
        pytest.raises(TransferError, match="connection ended"),
    ):
        fetch("Org/large", tmp_path, from_peers(impostor))


def test_a_model_we_cannot_run_costs_no_weights(tmp_path):
    make_large(tmp_path / "a" / "strange")
    config = tmp_path / "a" / "strange" / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "MambaForCausalLM"))
    with sharing(tmp_path / "a") as share:
        counted = Wire(share.port)
        with pytest.raises(UnsupportedModel):
            fetch("strange", tmp_path / "b", from_peers(counted.address))
        counted.close()
    assert counted.carried < 100_000


@pytest.mark.parametrize("name", ["../a", "/etc", ".hidden", "a/b/c", "", "a\0b", "ä"])
def test_a_name_that_could_be_a_path_is_refused(name, tmp_path):
    with pytest.raises(ConfigError, match="cannot be fetched"):
        fetch(name, tmp_path, from_peers("127.0.0.1:1"))


def test_files_with_odd_names_and_links_come_as_files(tmp_path):
    blobs = make_checkpoint(tmp_path / "blobs", shards=2)
    linked = tmp_path / "a" / "linked"
    linked.mkdir(parents=True)
    for path in blobs.iterdir():
        (linked / path.name).symlink_to(path)
    (linked / 'odd ü "name"\n%s.json').write_text("{}")
    (linked / "tokenizer empty").write_bytes(b"")
    (linked / "dangling.json").symlink_to(tmp_path / "nothing")
    (linked / "directory.json").mkdir()
    (linked / "secret.txt").write_text("not of the model")
    with sharing(tmp_path / "a") as share:
        path = fetch("linked", tmp_path / "b", from_peers(share))
    names = {p.name for p in path.iterdir()} - {".digests"}
    assert names == {p.name for p in blobs.iterdir()} | {
        'odd ü "name"\n%s.json',
        "tokenizer empty",
    }
    assert not any(p.is_symlink() for p in path.iterdir())
    assert resolve("linked", tmp_path / "b").id == "linked"


def test_what_is_no_model_is_not_put_in_place(tmp_path):
    model = make_checkpoint(tmp_path / "a" / "cut")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with sharing(tmp_path / "a") as share, pytest.raises(TransferError, match="truncated"):
        fetch("cut", tmp_path / "b", from_peers(share))
    assert list_models(tmp_path / "b") == ()
    with pytest.raises(ModelNotFound):
        resolve("cut", tmp_path / "b")
