"""Processes that die or are told to: streams go on, nothing is left, the next start works."""

import os
import signal

import httpx
import pytest

from tests.support.polling import eventually
from tests.support.server import (
    SHARED_MEMORY,
    Server,
    Streamed,
    is_running,
    left_in_shared_memory,
    run_cli,
)
from tests.support.smollm2 import smollm2_directory

TOKENS = 600


def test_a_stream_survives_its_instance_with_the_same_tokens(checkpoints, tmp_path):
    with Server(tmp_path, checkpoints, "--colocated-count", "2") as server:
        undisturbed = Streamed(server.url, "bob", "the device", TOKENS).whole()
        stream = Streamed(server.url, "bob", "the device", TOKENS)
        eventually(lambda: stream.has_begun, within_s=30)
        os.kill(server.instance_pids()[stream.instances[-1]], signal.SIGKILL)
        assert stream.whole() == undisturbed
        assert len(set(stream.instances)) == 2

        # The dead one comes back, by another pid.
        eventually(lambda: len(server.instance_pids()) == 2, within_s=30)


@pytest.mark.thorough
def test_a_real_checkpoint_goes_on_behind_its_tokens_in_the_restarted_instance(tmp_path):
    models = {"smol": smollm2_directory()}
    prompt = "Once upon a time, there was a"
    with Server(tmp_path, models) as server:
        undisturbed = Streamed(server.url, "smol", prompt, 24).whole()
        stream = Streamed(server.url, "smol", prompt, 24)
        eventually(lambda: len(stream.pieces) >= 4, within_s=60)
        (pid,) = server.instance_pids().values()
        os.kill(pid, signal.SIGKILL)
        assert stream.whole() == undisturbed


def test_a_killed_proxy_comes_back_and_what_ran_for_it_is_dropped(checkpoints, tmp_path):
    with Server(tmp_path, checkpoints) as server:
        lost = [Streamed(server.url, model, "the device", 4000) for model in checkpoints]
        eventually(lambda: all(stream.has_begun for stream in lost), within_s=30)
        os.kill(server.proxy_pid(), signal.SIGKILL)
        eventually(lambda: b"destination closed" in server.log.read_bytes(), within_s=30)
        eventually(lambda: server.requests() == 0, within_s=1)
        with pytest.raises(httpx.TransportError):
            _ = [stream.whole() for stream in lost]
        eventually(server.is_listening, within_s=30)
        assert Streamed(server.url, "bob", "the device", 5).whole()


def test_sigterm_lets_streams_end_and_leaves_nothing(checkpoints, tmp_path):
    server = Server(tmp_path, checkpoints, "--colocated-count", "2").start()
    try:
        undisturbed = Streamed(server.url, "cleo", "a device", TOKENS).whole()
        stream = Streamed(server.url, "cleo", "a device", TOKENS)
        eventually(lambda: stream.has_begun, within_s=30)
        pids = server.instance_pids()
        os.kill(server.pid, signal.SIGTERM)
        assert stream.whole() == undisturbed
        assert server.wait() == 0
    finally:
        server.stop()
    assert left_in_shared_memory(server.domain) == []
    assert not any(is_running(pid) for pid in pids.values())


@pytest.mark.parametrize("same_domain", [True, pytest.param(False, marks=pytest.mark.thorough)])
def test_a_killed_server_blocks_no_next_start(checkpoints, tmp_path, same_domain):
    models = {"ada": checkpoints["ada"]}
    killed = Server(tmp_path, models).start()
    port, pids = killed.port, killed.instance_pids()
    assert Streamed(killed.url, "ada", "the device", 5).whole()
    killed.kill()
    eventually(lambda: not any(is_running(pid) for pid in pids.values()), within_s=20)
    left = left_in_shared_memory(killed.domain)
    for kind in ("weights", "weights+0-0", "kv", "kv+arena"):
        assert f"aegaeon-{killed.domain}.{kind}" in left

    after = killed if same_domain else Server(tmp_path, models)
    try:
        after.start(port)
        assert Streamed(after.url, "ada", "the device", 5).whole()
    finally:
        after.stop()
    assert left_in_shared_memory(killed.domain) == left_in_shared_memory(after.domain) == []


def test_a_second_server_of_one_domain_is_refused_and_harms_nothing(checkpoints, tmp_path):
    models = {"ada": checkpoints["ada"], "bob": checkpoints["bob"]}
    with Server(tmp_path, models) as server:
        undisturbed = Streamed(server.url, "bob", "the device", TOKENS).whole()

        def regions():
            names = left_in_shared_memory(server.domain)
            return {name: (SHARED_MEMORY / name).stat().st_ino for name in names}

        before = regions()
        stream = Streamed(server.url, "bob", "the device", TOKENS)
        eventually(lambda: stream.has_begun, within_s=30)
        flags = ("--models", str(checkpoints["ada"]), "--port", "0", "--kv-budget-gb", "0.01")
        done = run_cli("serve", "--domain", server.domain, *flags)
        errors = [line for line in done.stderr.splitlines() if "aegaeon: error: " in line]
        assert done.returncode != 0 and len(errors) == 1 and "Traceback" not in done.stderr
        assert server.domain in errors[0] and f"pid {server.pid}" in errors[0]
        assert "--domain" in errors[0]

        assert regions() == before
        assert stream.whole() == undisturbed
        assert Streamed(server.url, "ada", "the device", 5).whole()
