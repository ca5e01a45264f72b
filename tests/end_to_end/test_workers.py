"""Several workers of one uvicorn, in the domain of one `aegaeon instances`."""

import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.end_to_end.test_other_ways import environment
from tests.support.polling import eventually
from tests.support.server import ROOT, is_running, left_in_shared_memory

WORKERS = 3
STREAMS = 12


@contextmanager
def running(command, log, settings):
    process = subprocess.Popen(
        [sys.executable, "-m", *command], env=settings, cwd=ROOT, stdout=log, stderr=log
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def workers_of(pid):
    """Return the worker processes of uvicorn's own, which has a helper besides."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    command = {child: Path(f"/proc/{child}/cmdline").read_text() for child in children}
    return [int(child) for child, line in command.items() if "spawn_main" in line]


def is_up(url):
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


class Streams:
    """Streams of one prompt, each on a connection of its own; their texts, None where one broke."""

    def __init__(self, url, tokens):
        self._url, self._tokens = url, tokens
        self.begun = threading.Semaphore(0)
        self.texts = [None] * STREAMS
        self._threads = [threading.Thread(target=self._read, args=(n,)) for n in range(STREAMS)]
        for thread in self._threads:
            thread.start()

    def _read(self, number):
        body = {"model": "ada", "prompt": "the device", "max_tokens": self._tokens}
        body |= {"ignore_eos": True, "temperature": 0, "stream": True}
        try:
            with httpx.stream("POST", f"{self._url}/v1/completions", json=body, timeout=60) as got:
                lines = []
                for line in got.iter_lines():
                    if line.startswith("data: "):
                        lines.append(line)
                        if len(lines) == 1:
                            self.begun.release()
                if lines[-1] == "data: [DONE]":
                    self.texts[number] = _text(lines[:-1])
        except httpx.TransportError:
            pass

    def until_begun(self):
        for _ in range(STREAMS):
            assert self.begun.acquire(timeout=30)

    def read(self):
        for thread in self._threads:
            thread.join(60)
        return self.texts


def _text(lines):
    frames = [httpx.Response(200, text=line[6:]).json() for line in lines]
    assert not any("error" in frame for frame in frames)
    return "".join(frame["choices"][0]["text"] for frame in frames)


@pytest.mark.thorough
def test_a_lost_worker_takes_only_its_own_streams_and_a_stop_lets_all_end(checkpoints, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url, domain = f"http://127.0.0.1:{port}", f"workers-{os.getpid()}"
    settings = environment(
        AEGAEON_MODELS=f"ada={checkpoints['ada']}",
        AEGAEON_DOMAIN=domain,
        AEGAEON_THREADS_PER_INSTANCE="1",
    )
    serve = ["uvicorn", "aegaeon.proxy:app", "--port", str(port), "--workers", str(WORKERS)]
    with (tmp_path / "log").open("wb") as log, running(["aegaeon", "instances"], log, settings):
        eventually(lambda: left_in_shared_memory(domain), within_s=60)
        with running(serve, log, settings) as server:
            eventually(lambda: is_up(url) and len(workers_of(server.pid)) == WORKERS, within_s=60)
            (alone,) = set(Streams(url, 900).read())
            assert alone
            streams = Streams(url, 900)
            streams.until_begun()
            killed = workers_of(server.pid)[0]
            os.kill(killed, signal.SIGKILL)
            texts = streams.read()
            assert set(texts) <= {alone, None}
            assert texts.count(None) < STREAMS
            eventually(lambda: len(workers_of(server.pid)) == WORKERS, within_s=30)
            assert killed not in workers_of(server.pid)
            eventually(lambda: is_up(url), within_s=30)
            streams = Streams(url, 900)
            streams.until_begun()
            workers = workers_of(server.pid)
            server.send_signal(signal.SIGTERM)
            assert streams.read() == [alone] * STREAMS
            assert server.wait(30) == 0
            assert not any(map(is_running, workers))
    assert left_in_shared_memory(domain) == []


def instances_of(domain):
    """The processes that own instances of this domain's server, and those."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_text().split("\0")
            settings = (file.parent / "environ").read_bytes()
        except OSError:
            continue  # it has just ended
        is_one = "aegaeon.instance.worker" in words or "instances" in words
        if is_one and f"AEGAEON_DOMAIN={domain}".encode() in settings:
            found.append(int(file.parent.name))
    return found


@pytest.mark.thorough
def test_instances_outlive_whichever_worker_started_them_and_end_with_the_server(
    checkpoints, tmp_path
):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url, domain = f"http://127.0.0.1:{port}", f"owner-{os.getpid()}"
    settings = environment(
        AEGAEON_MODELS=f"ada={checkpoints['ada']}",
        AEGAEON_DOMAIN=domain,
        AEGAEON_COLOCATED_COUNT="1",
        AEGAEON_THREADS_PER_INSTANCE="1",
    )
    serve = ["uvicorn", "aegaeon.proxy:app", "--port", str(port), "--workers", "2"]
    with (tmp_path / "log").open("wb") as log, running(serve, log, settings) as server:
        eventually(lambda: is_up(url) and len(workers_of(server.pid)) == 2, within_s=60)
        eventually(lambda: len(instances_of(domain)) == 2, within_s=30)
        before = instances_of(domain)
        (alone,) = set(Streams(url, 300).read())
        assert alone
        for killed in workers_of(server.pid):  # one of them has started the instances
            os.kill(killed, signal.SIGKILL)
            eventually(lambda: killed not in workers_of(server.pid), within_s=30)  # noqa: B023
            eventually(lambda: is_up(url) and len(workers_of(server.pid)) == 2, within_s=30)
            assert Streams(url, 300).read().count(alone) >= STREAMS / 2
        assert instances_of(domain) == before
    eventually(lambda: not instances_of(domain), within_s=30)
    eventually(lambda: left_in_shared_memory(domain) == [], within_s=30)
