"""A /dev/shm that is full, in a mount namespace of the test's own: refused, or lived with."""

import contextlib
import os
import signal
import subprocess

import pytest

from tests.support.polling import eventually
from tests.support.server import Server, Streamed

SIZES = ("--model-cache-budget-gb", "0.002", "--kv-budget-gb", "0.004")
SCRIPT = 'mount -t tmpfs -o size={size} tmpfs /dev/shm && {fill} && exec "$@"'
FILL = "{ head -c 2000000 /dev/zero >/dev/shm/filler 2>/dev/null || true; }"


def wrapper(size, fill="true"):
    """The command that gives the one behind it a /dev/shm of `size`."""
    return ("unshare", "--mount", "sh", "-c", SCRIPT.format(size=size, fill=fill), "sh")


@pytest.fixture(autouse=True)
def _may_mount():
    """Skip where mounting is not allowed."""
    with contextlib.suppress(FileNotFoundError):
        done = subprocess.run([*wrapper("1m"), "true"], capture_output=True, check=False)
        if done.returncode == 0:
            return
    pytest.skip("needs to mount a tmpfs of its own (root, and unshare)")


def fill(server):
    """Leave no byte free in the server's shared memory; return the file that takes them."""
    filler = server.shared_memory / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 20, 4096):
            with contextlib.suppress(OSError):
                while True:
                    assert file.write(b"\0" * size)
    return filler


@pytest.mark.parametrize(("size", "before"), [("1m", FILL), ("1m", "true"), ("68m", "true")])
def test_too_little_shared_memory_is_refused_at_start(checkpoints, tmp_path, size, before):
    models = {"ada": checkpoints["ada"]}
    server = Server(tmp_path, models, *SIZES, wrapper=wrapper(size, before))
    with pytest.raises(AssertionError) as failed:
        server.start()
    said = str(failed.value)
    assert said.count("aegaeon: error: ") == 1 and "Traceback" not in said, said
    assert "/dev/shm" in said, said


def test_memory_that_fills_up_under_a_server_fails_what_needs_more_and_nothing_else(
    checkpoints, tmp_path
):
    with Server(tmp_path, checkpoints, *SIZES, wrapper=wrapper("160m")) as server:
        expected = {name: server.ask(name, 40).json()["choices"] for name in ("ada", "bob")}
        pids = server.instance_pids()
        filler = fill(server)

        # Nothing new comes in; the log has the remedy.
        answer = server.ask("cleo")
        assert answer.status_code == 503 and "retry-after" in answer.headers
        error = answer.json()["error"]
        assert error["code"] == "memory_full" and "/dev/shm" not in error["message"]
        assert "--shm-size" in server.log.read_text()
        # What is in goes on, with the blocks that its KV has.
        for name, choices in expected.items():
            assert server.ask(name, 40).json()["choices"] == choices

        # So small a pool had its memory before anybody used it: long answers come as well.
        stream = Streamed(server.url, "ada", "the device", 300).whole()
        filler.unlink()
        assert stream == Streamed(server.url, "ada", "the device", 300).whole()
        assert server.ask("cleo").status_code == 200
        assert server.instance_pids() == pids


def test_an_instance_killed_while_memory_is_full_comes_back_when_it_is_not(checkpoints, tmp_path):
    models = {"ada": checkpoints["ada"]}
    with Server(tmp_path, models, *SIZES, wrapper=wrapper("160m")) as server:
        expected = server.ask("ada").json()["choices"]
        filler = fill(server)
        (pid,) = server.instance_pids().values()
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: "cannot reserve" in server.log.read_text(), within_s=30)
        filler.unlink()
        eventually(lambda: server.ask("ada").status_code == 200, within_s=30)
        assert server.ask("ada").json()["choices"] == expected
