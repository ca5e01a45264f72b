"""Processes that live and do nothing: readiness says so, they are replaced, streams go on."""

import os
import signal
import textwrap

import httpx
import pytest

from tests.support.polling import eventually
from tests.support.server import ROOT, Server, Streamed, is_running

TOKENS = 400
FLAGS = ("--colocated-count", "2", "--lease-s", "5", "--watchdog-s", "3")


def reasons(server):
    """Return why the server is not ready; nothing when it is."""
    answer = httpx.get(f"{server.url}/health/ready", timeout=20)
    body = answer.json()
    assert (answer.status_code, body["status"]) in {(200, "ready"), (503, "unready")}
    assert bool(body["reasons"]) == (answer.status_code == 503)
    return " ".join(body["reasons"])


def metrics(server):
    return httpx.get(f"{server.url}/metrics", timeout=10).text


def is_replaced(server, name, pid):
    return server.instance_pids().get(name, pid) != pid and not is_running(pid)


def test_a_stopped_instance_is_replaced_and_its_stream_goes_on(checkpoints, tmp_path):
    with Server(tmp_path, checkpoints, *FLAGS) as server:
        assert reasons(server) == ""
        undisturbed = Streamed(server.url, "bob", "the device", TOKENS).whole()
        stream = Streamed(server.url, "bob", "the device", TOKENS)
        eventually(lambda: stream.has_begun, within_s=30)
        name = stream.instances[-1]
        pid = server.instance_pids()[name]
        os.kill(pid, signal.SIGSTOP)
        eventually(lambda: f"{name} does not answer" in reasons(server), within_s=30)
        assert httpx.get(f"{server.url}/health/live", timeout=10).json() == {"status": "live"}
        assert stream.whole() == undisturbed
        eventually(lambda: is_replaced(server, name, pid), within_s=60)
        eventually(lambda: reasons(server) == "", within_s=60)
        assert b"hung name=" in server.log.read_bytes()
        told = f'aegaeon_instance_restarts_total{{instance="{name}"}} 1'
        eventually(lambda: told in metrics(server))


def stuck_when_told(directory):
    """Make the first instance that finds the file `stop` there stand in its next step. Returns the
    environment in which instances do, and the file."""
    told = directory / "stop"
    (directory / "sitecustomize.py").write_text(
        textwrap.dedent(f"""
            import sys, time
            from pathlib import Path
            if "aegaeon.instance.worker" in sys.orig_argv:
                from aegaeon.engine.engine import ModelEngine
                execute = ModelEngine.execute
                def stand(self, action):
                    try:
                        Path({str(told)!r}).unlink()
                    except FileNotFoundError:
                        return execute(self, action)
                    time.sleep(1000)
                ModelEngine.execute = stand
            """)
    )
    return {"PYTHONPATH": f"{directory}:{ROOT}"}, told


@pytest.mark.thorough
def test_an_instance_whose_step_never_ends_is_replaced_and_its_stream_goes_on(
    checkpoints, tmp_path
):
    environment, told = stuck_when_told(tmp_path)
    with Server(tmp_path, checkpoints, *FLAGS, environment=environment) as server:
        undisturbed = Streamed(server.url, "cleo", "the device", TOKENS).whole()
        before = server.instance_pids()
        stream = Streamed(server.url, "cleo", "the device", TOKENS)
        eventually(lambda: stream.has_begun, within_s=30)
        told.touch()
        eventually(lambda: not told.exists(), within_s=10)
        name = stream.instances[-1]
        assert stream.whole() == undisturbed
        assert is_replaced(server, name, before[name]) or not is_running(before[name])
        assert b"compute lane has stood for 3 s" in server.log.read_bytes()
        eventually(lambda: len(server.instance_pids()) == 2, within_s=60)
        eventually(lambda: reasons(server) == "", within_s=60)


@pytest.mark.thorough
def test_a_proxy_that_does_not_respond_is_replaced(checkpoints, tmp_path):
    flags = ("--watchdog-s", "3", "--lease-s", "5")
    shorter = tmp_path / "sitecustomize.py"
    shorter.write_text(
        textwrap.dedent("""
            import sys
            if "serve" in sys.orig_argv:
                from aegaeon import watch
                watch.ASK_S, watch.ANSWER_S, watch.PROXY_S = 0.5, 1.0, 2.0
            """)
    )
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    with Server(tmp_path, checkpoints, *flags, environment=environment) as server:
        assert Streamed(server.url, "ada", "the device", 5).whole()
        pid = server.proxy_pid()
        eventually(lambda: b"started name=proxy" in server.log.read_bytes())
        os.kill(pid, signal.SIGSTOP)
        eventually(lambda: not is_running(pid), within_s=60)
        eventually(server.is_listening, within_s=60)
        assert Streamed(server.url, "ada", "the device", 5).whole()
        assert "aegaeon_proxy_restarts_total 1" in metrics(server)
        assert "aegaeon_proxy_hangs_total 1" in metrics(server)
