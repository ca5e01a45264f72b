"""What a node that shares does with bytes and questions of all kinds."""

import socket
import time

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aegaeon.errors import TransferError
from aegaeon.transfer import share as share_module
from aegaeon.transfer.fetch import Sources, fetch
from aegaeon.transfer.manifest import Manifest, check
from aegaeon.transfer.wire import MAGIC, AskChunk, AskManifest, Data, Line, Refused
from tests.support.checkpoints import make_checkpoint
from tests.support.polling import eventually
from tests.support.sharing import SECRET, assert_same, sharing


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    root = tmp_path_factory.mktemp("held")
    make_checkpoint(root / "Org__small")
    (root / "secret.json").write_text("not in a model")
    return root


@pytest.fixture(scope="module")
def node(held):
    with sharing(held) as share:
        yield share


@pytest.fixture(scope="module")
def small(held, node):
    return str(held / "Org__small")


def line_to(share):
    return Line(socket.create_connection(("127.0.0.1", share.port), timeout=5), SECRET, "ask")


def asked(share, *questions):
    line = line_to(share)
    try:
        answers = []
        for question in questions:
            line.send(question)
            answers.append(line.answer())
        return answers
    finally:
        line.close()


NAMES = ["../Org__small", "Org__small/../../secret.json", "..", ".", "", "/", "secret.json", "\0"]


@pytest.mark.parametrize("name", NAMES)
def test_only_models_can_be_asked_for(name, node, held):
    (answer,) = asked(node, AskManifest(str(held / "Org__small") if name == "/" else name))
    assert isinstance(answer, Refused) and answer.why == "unknown"


@pytest.mark.parametrize(
    ("file", "index"),
    [("../secret.json", 0), ("config.json", -1), ("config.json", 1), ("/etc/passwd", 0), ("", 0)],
)
def test_only_parts_of_models_can_be_asked_for(file, index, node):
    line = line_to(node)
    line.send(AskManifest("Org/small"))
    digest = line.answer().digest
    line.send(AskChunk("Org/small", digest, file, index))
    assert isinstance(line.answer(), Refused)
    line.send(AskChunk("Org/small", digest, "config.json", 0))
    assert isinstance(line.answer(), Data)
    line.close()
    (answer,) = asked(node, AskChunk("Org/small", "0" * 64, "config.json", 0))
    assert answer.why == "changed"


def is_well(share):
    return isinstance(asked(share, AskManifest("Org/small"))[0], Manifest)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300), st.booleans())
def test_bytes_of_strangers_do_no_harm(node, data, is_greeted):
    with socket.create_connection(("127.0.0.1", node.port), timeout=5) as stranger:
        stranger.sendall((MAGIC + bytes(16) if is_greeted else b"") + data)
        stranger.shutdown(socket.SHUT_WR)
        got = b""
        while part := stranger.recv(1 << 16):
            got += part
    assert len(got) <= 24  # a greeting, and nothing more
    assert is_well(node)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.recursive(
        st.none() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_frames_without_meaning_do_no_harm(node, body):
    line = line_to(node)
    line.send(body)  # what a member of the cluster of another release might say
    with pytest.raises((OSError, TransferError)):
        line.answer()
    line.close()
    assert is_well(node)


@settings(max_examples=150)
@given(
    st.builds(
        dict,
        type=st.just("Manifest"),
        files=st.lists(
            st.fixed_dictionaries(
                {
                    "name": st.text(max_size=8) | st.sampled_from(["a.json", "b.safetensors"]),
                    "file_bytes": st.integers(-(2**63), 2**63),
                    "digests": st.binary(max_size=70),
                }
            ),
            max_size=3,
        ),
    )
)
def test_a_manifest_passes_only_if_it_can_be_true(raw):
    try:
        manifest = check(msgspec.msgpack.decode(msgspec.msgpack.encode(raw), type=Manifest))
    except (TransferError, msgspec.DecodeError):
        return
    for file in manifest.files:
        assert file.name[0] != "." and "/" not in file.name and "\0" not in file.name
        assert file.name.endswith((".json", ".safetensors", ".jinja")) or "tokenizer" in file.name
        assert 0 <= file.file_bytes <= 2 << 23 and len(file.digests) == 32 * file.chunks


def test_a_recorded_question_cannot_be_asked_again(node):
    recorded = []

    class Recorder:
        def __init__(self, inner):
            self.inner = inner

        def sendall(self, data):
            recorded.append(bytes(data))
            self.inner.sendall(data)

        def __getattr__(self, name):
            return getattr(self.inner, name)

    line = Line(Recorder(socket.create_connection(("127.0.0.1", node.port))), SECRET, "ask")
    line.send(AskManifest("Org/small"))
    assert isinstance(line.answer(), Manifest)
    line.close()
    with socket.create_connection(("127.0.0.1", node.port), timeout=5) as again:
        again.sendall(b"".join(recorded))
        got = b""
        while part := again.recv(1 << 16):
            got += part
    assert len(got) == 24


def test_those_who_connect_and_say_nothing_keep_no_place(held, monkeypatch, tmp_path):
    monkeypatch.setattr(share_module, "MAX_CONNECTIONS", 4)
    monkeypatch.setattr(share_module, "GREETING_S", 2.0)
    monkeypatch.setattr("aegaeon.transfer.wire.GREETING_S", 2.0)
    with sharing(held) as share:
        silent = [socket.create_connection(("127.0.0.1", share.port)) for _ in range(20)]
        greeted = [one.recv(100) != b"" for one in silent]
        assert sum(greeted) == 4
        address = f"127.0.0.1:{share.port}"
        sources = Sources(peers=(address,), secret=SECRET, has_hub=False)
        eventually(lambda: len(share._open) < 4)
        fetch("Org/small", tmp_path, sources)
        for one in silent:
            one.close()
    assert_same(held / "Org__small", tmp_path / "Org__small")


def test_who_sends_a_byte_now_and_then_keeps_no_place_either(held, monkeypatch):
    monkeypatch.setattr(share_module, "GREETING_S", 1.0)
    monkeypatch.setattr("aegaeon.transfer.wire.GREETING_S", 1.0)
    with sharing(held) as share:
        slow = socket.create_connection(("127.0.0.1", share.port))
        began = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - began < 20:
                slow.sendall(b"a")
                time.sleep(0.1)
        assert time.monotonic() - began < 10
        slow.close()


def test_closing_ends_all_connections_and_threads(held):
    with sharing(held) as share:
        line = line_to(share)
        line.send(AskManifest("Org/small"))
        line.answer()
    with pytest.raises((OSError, TransferError)):
        line.send(AskManifest("Org/small"))
        line.answer()
    assert not share._open
    line.close()
