"""Fetching by processes that die, that are several, and that have little room."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from aegaeon.cli import main
from aegaeon.transfer.fetch import Sources, fetch
from aegaeon.transfer.manifest import CHUNK_BYTES
from tests.support.polling import eventually
from tests.support.sharing import SECRET, assert_same, make_large, sharing
from tests.support.small_memory import run_in_small_memory
from tests.support.wire import Wire


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    root = tmp_path_factory.mktemp("held")
    make_large(root / "Org__large")
    return root


@pytest.fixture
def secret_file(tmp_path):
    path = tmp_path / "secret"
    path.write_bytes(SECRET + b"\n")
    return path


def aegaeon(*given):
    command = [sys.executable, "-m", "aegaeon", "models", *map(str, given)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def fetching(address, root, secret_file):
    where = ("--models-dir", root, "--secret-file", secret_file, "--no-hub")
    return aegaeon("fetch", "Org/large", "--from", address, *where)


def trickle(before, data):
    time.sleep(0.002 * len(data) / (1 << 16))
    return data


def test_a_fetch_killed_in_the_middle_goes_on(held, tmp_path, secret_file):
    with sharing(held) as share:
        wire = Wire(share.port, trickle)
        process = fetching(wire.address, tmp_path / "a", secret_file)
        eventually(lambda: wire.carried > 3 * CHUNK_BYTES)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=20)
        before = wire.carried
        assert not (tmp_path / "a" / "Org__large").exists()
        again = fetching(wire.address, tmp_path / "a", secret_file)
        out, err = again.communicate(timeout=60)
        wire.close()
    assert (again.returncode, out.strip()) == (0, str(tmp_path / "a" / "Org__large")), err
    assert_same(held / "Org__large", tmp_path / "a" / "Org__large")
    assert wire.carried < 2 * before + 3 * CHUNK_BYTES  # not all of it twice
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["Org__large"]


def test_a_node_killed_in_the_middle_and_started_again_is_waited_for(held, tmp_path, secret_file):
    shared = ("--models-dir", held, "--secret-file", secret_file)
    first = aegaeon("share", *shared, "--port", "0")
    port = first.stdout.readline().strip().rpartition(":")[2]
    wire = Wire(int(port), trickle)
    process = fetching(wire.address, tmp_path / "a", secret_file)
    eventually(lambda: wire.carried > 2 * CHUNK_BYTES)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate(timeout=20)
    second = aegaeon("share", *shared, "--port", port)
    assert second.stdout.readline() == f"shares 1 models at 127.0.0.1:{port}\n"
    _, err = process.communicate(timeout=60)
    wire.close()
    second.terminate()
    second.communicate(timeout=30)
    assert (process.returncode, second.returncode) == (0, 0), err
    assert_same(held / "Org__large", tmp_path / "a" / "Org__large")


def test_of_two_processes_one_fetches(held, tmp_path, secret_file):
    with sharing(held) as share:
        wire = Wire(share.port, trickle)
        both = [fetching(wire.address, tmp_path / "a", secret_file) for _ in range(3)]
        ends = [process.communicate(timeout=60) for process in both]
        wire.close()
    assert [process.returncode for process in both] == [0, 0, 0], ends
    size = sum(path.stat().st_size for path in (held / "Org__large").iterdir())
    assert wire.carried < size * 1.2
    assert_same(held / "Org__large", tmp_path / "a" / "Org__large")


FULL = """
import pathlib, shutil, sys
from aegaeon.errors import CannotStore
from aegaeon.transfer import storing
from aegaeon.cli import main
from aegaeon.transfer.fetch import Sources, fetch
small, held, is_told = sys.argv[1:]
if is_told == "late":  # as when others fill the disk meanwhile
    storing.Storing._check_room = lambda *_: None
sources = Sources(shared_dirs=(held,), has_hub=False)
try:
    fetch("Org/large", small, sources)
except CannotStore as error:
    wanted = {"early": "GB are to come", "late": "no room is left"}[is_told]
    assert wanted in str(error), error
    assert not (pathlib.Path(small) / "Org__large").exists()
else:
    raise SystemExit("it fitted")
"""


@pytest.mark.parametrize("is_told", ["early", "late"])
def test_a_full_disk_is_told(is_told, held, tmp_path):
    run_in_small_memory(tmp_path / "small", "20m", FULL, held, is_told)


def test_the_lock_of_a_dead_process_holds_nobody_up(held, tmp_path):
    (tmp_path / ".Org__large.lock").touch()
    fetch("Org/large", tmp_path, Sources(shared_dirs=(str(held),), has_hub=False))
    assert [path.name for path in tmp_path.iterdir()] == ["Org__large"]
    shutil.rmtree(tmp_path / "Org__large")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["fetch", "a", "--from", "nowhere"], "it must look like HOST:PORT"),
        (["fetch", "a", "--from", "h:1"], "--secret-file FILE"),
        (["fetch", "a", "--from", "h:1", "--secret-file", "nofile"], "head -c 32 /dev/urandom"),
        (["share", "--secret-file", "short"], "has 3 bytes, take at least 16"),
        (["share"], "--secret-file"),
        (["fetch", "../a", "--no-hub"], "cannot be fetched"),
    ],
)
def test_wrong_usage_is_told_in_a_line(given, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short").write_text("abc")
    assert main(["models", *given]) == 2
    assert message in capsys.readouterr().err


def test_a_shared_model_goes_by_the_name_it_was_given(held, tmp_path, secret_file):
    one = f"mine={held / 'Org__large'}"
    share = aegaeon("share", one, "--secret-file", secret_file, "--port", "0")
    address = share.stdout.readline().strip().rpartition(" ")[2]
    fetch("mine", tmp_path / "a", Sources(peers=(address,), secret=SECRET, has_hub=False))
    share.send_signal(signal.SIGINT)
    share.communicate(timeout=30)
    assert share.returncode == 0
    assert_same(held / "Org__large", tmp_path / "a" / "mine")
