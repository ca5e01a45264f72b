"""Disks that fail, end short, hang or lose a model under a server: that model's trouble alone."""

import os
import signal

import pytest

from aegaeon.models.checkpoint import plan_load
from aegaeon.models.packing import plan_pack
from tests.support.bad_disk import BadDisk
from tests.support.checkpoints import make_checkpoint
from tests.support.polling import eventually
from tests.support.server import Server, Streamed, is_running

# Room for three of the four models.
SMALL_CACHE = ("--model-cache-budget-gb", "0.0012")
PATIENCE = ("--request-timeout-s", "6", "--lease-s", "2")


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    return BadDisk(tmp_path_factory.mktemp("disk"))


@pytest.fixture(scope="module")
def weak(tmp_path_factory):
    """The model whose disk is bad."""
    return make_checkpoint(tmp_path_factory.mktemp("weak") / "weak", seed=7)


@pytest.fixture(scope="module")
def server(checkpoints, disk, weak, tmp_path_factory):
    models = {**checkpoints, "weak": weak}
    directory = tmp_path_factory.mktemp("server")
    with Server(
        directory, models, *SMALL_CACHE, *PATIENCE, environment=disk.environment
    ) as running:
        yield running


def text_of(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def key_of(model):
    return plan_pack(plan_load(model)).digest()


def evict(server, key):
    """Take the room of the model whose key is `key`, as another process might that needs it."""
    with server.weights() as cache:
        eventually(lambda: cache.evict(key))


def assert_fails_alone(server, weak):
    answer = server.ask("weak")
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert error["code"] == "checkpoint_error" and "\n" not in error["message"]
    assert str(weak.parent) not in answer.text
    assert text_of(server.ask("ada"))
    with server.weights() as cache:
        assert all(not entry.pin_pids for entry in cache.status())


@pytest.mark.parametrize("first_read", [0, 7])
@pytest.mark.parametrize(("fault", "says"), [("eio", "Input/output error"), ("eof", "ends at")])
def test_a_failing_disk_fails_its_model_until_it_is_well(
    server, disk, weak, fault, says, first_read
):
    expected, key = text_of(server.ask("weak")), key_of(weak)
    evict(server, key)
    said = server.log.read_text().count(says)
    disk.fails(fault, str(weak), first_read)
    assert_fails_alone(server, weak)
    assert server.log.read_text().count(says) > said
    disk.recovers()
    assert text_of(server.ask("weak")) == expected


def test_short_reads_change_no_token(server, disk, weak):
    expected, key = text_of(server.ask("weak")), key_of(weak)
    evict(server, key)
    disk.fails("short", str(weak))
    assert text_of(server.ask("weak")) == expected
    disk.recovers()


@pytest.mark.thorough
def test_a_disk_that_hangs_costs_its_requests_their_deadline_and_no_others(server, disk, weak):
    expected, key = text_of(server.ask("weak")), key_of(weak)
    evict(server, key)
    disk.fails("hang", str(weak))
    waiting = Streamed(server.url, "weak", "the device", 3)
    eventually(lambda: "weak" in server.cached())
    for name in ("ada", "bob", "cleo"):
        text_of(server.ask(name))
    with pytest.raises(AssertionError, match="timeout"):
        waiting.whole()
    disk.recovers()
    assert text_of(server.ask("weak")) == expected


def test_a_model_deleted_under_a_server_goes_on_while_it_is_cached(server, weak, tmp_path):
    expected, key = text_of(server.ask("weak")), key_of(weak)
    weak.rename(tmp_path / "away")
    assert text_of(server.ask("weak")) == expected
    evict(server, key)
    assert_fails_alone(server, weak)
    (tmp_path / "away").rename(weak)
    assert text_of(server.ask("weak")) == expected


@pytest.mark.thorough
def test_a_stopped_loader_is_waited_for_and_a_dead_one_replaced(checkpoints, disk, weak, tmp_path):
    models = {"ada": checkpoints["ada"], "weak": weak}
    flags = ("--colocated-count", "2", "--lease-s", "2")
    with Server(tmp_path, models, *flags, environment=disk.environment) as server:
        expected = Streamed(server.url, "weak", "the device", 40).whole()
        evict(server, key_of(weak))
        disk.fails("hang", str(weak))
        stream = Streamed(server.url, "weak", "the device", 40)
        eventually(lambda: "weak" in server.loaders() and "weak" in server.cached())
        loader = server.loaders()["weak"]
        os.kill(loader, signal.SIGSTOP)
        disk.recovers()
        # Its lease ends, so its requests go elsewhere, where the load is still its own.
        eventually(lambda: loader not in server.instance_pids().values())
        # Those of another model do not wait for that.
        text_of(server.ask("ada"))
        pieces = list(stream.pieces)
        # On a busy machine the supervisor may have been first to kill what stands still.
        assert not pieces or not is_running(loader)
        if is_running(loader):
            os.kill(loader, signal.SIGKILL)
        assert stream.whole() == expected
        with server.weights() as cache:
            assert all(loader not in entry.pin_pids for entry in cache.status())


@pytest.mark.thorough
def test_who_waits_for_a_disk_that_hangs_is_told_so_long_before_the_deadline(
    checkpoints, disk, weak, tmp_path
):
    models = {"ada": checkpoints["ada"], "weak": weak}
    more = ("--watchdog-s", "5", "--request-timeout-s", "300")
    with Server(tmp_path, models, *more, environment=disk.environment) as server:
        lives = dict(server.instance_pids())
        disk.fails("hang", str(weak))
        answer = server.ask("weak")
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (503, "model_loading")
        assert "long in coming" in error["message"]
        assert str(weak) not in error["message"]
        text_of(server.ask("ada"))
        assert server.instance_pids() == lives  # a restart would help nobody
        disk.recovers()
        text_of(server.ask("weak"))
