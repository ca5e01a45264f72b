"""The proxy as a process of its own: ready, draining on SIGTERM, kept from starting."""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import httpx
import msgspec

from aegaeon.config import check_settings
from aegaeon.proxy.launch import EXIT_CANNOT_START, EXIT_DRAINED, ProxyLaunch
from aegaeon.store.domains import claim_domain
from aegaeon.store.shm import ShmDomain
from tests.support.fake_instance import FakeInstance, wait_until
from tests.support.proxy_server import TEXT, Proxy

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


class Worker:
    """The process, the domain it joins and an instance in this process."""

    def __init__(self, directory, port, drain_s=20.0):
        self.parts = Proxy(directory, models=("m",))
        self.settings = check_settings(
            {"port": port, "domain": f"test-proxy-{os.getpid()}", "drain_s": drain_s}
        )
        self.address = f"http://127.0.0.1:{port}"

    def half_a_body(self):
        """A connection whose request lacks some of its body."""
        half = socket.create_connection(("127.0.0.1", self.settings.port), 20)
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        half.sendall(f"{head}Content-Type: application/json\r\n".encode())
        half.sendall(b"Content-Length: 100\r\n\r\n{")
        return half

    @contextmanager
    def running(self):
        with claim_domain(self.settings):
            domain = ShmDomain(self.settings.domain_name)
            stop = self.parts.text.stop_token_ids[:1]
            self.instance = FakeInstance(domain, lambda _: (*self.parts.answer, *stop))
            try:
                yield self.start()
            finally:
                if self.process.poll() is None:
                    self.process.kill()
                self.process.wait(20)
                self.process.stderr.close()
                self.instance.die()
                domain.close()

    def start(self):
        reading, writing = os.pipe()
        launch = ProxyLaunch(
            settings=self.settings,
            specs=self.parts.specs,
            address="proxy.1",
            status_fd=writing,
            parent_pid=os.getpid(),
        )
        self.process = subprocess.Popen(
            [sys.executable, "-m", "aegaeon.proxy.worker"],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(writing,),
        )
        os.close(writing)
        self.process.stdin.write(msgspec.json.encode(launch))
        self.process.stdin.close()
        with os.fdopen(reading) as status:
            return status.read()


def test_a_worker_ends_its_streams_before_it_stops(tmp_path):
    worker = Worker(tmp_path, free_port())
    with worker.running() as failure:
        assert failure == ""
        worker.instance.hold_after = 3
        with httpx.Client(base_url=worker.address, timeout=30) as client:
            assert client.get("/health").json()["status"] == "ok"
            assert client.get("/health", headers={"x-long": "a" * 70_000}).status_code == 431
            body = {**CHAT, "stream": True}
            with (
                worker.half_a_body() as half,
                client.stream("POST", "/v1/chat/completions", json=body) as stream,
            ):
                lines = (line for line in stream.iter_lines() if line.startswith("data: {"))
                frames = [next(lines)]
                worker.process.send_signal(signal.SIGTERM)
                wait_until(lambda: client.get("/health").json()["status"] == "draining")
                refused = client.post("/v1/chat/completions", json=CHAT)
                assert refused.status_code == 503
                assert refused.json()["error"]["code"] == "draining"
                added = client.post("/admin/models", json={"reference": "x"})
                assert (added.status_code, added.json()["error"]["code"]) == (503, "draining")
                assert b" 503 " in half.recv(1 << 16)
                worker.instance.release()
                frames.extend(lines)
        text = "".join(
            json.loads(frame[6:])["choices"][0]["delta"].get("content", "") for frame in frames
        )
        assert text == TEXT
        assert worker.process.wait(20) == EXIT_DRAINED


def test_what_outlasts_the_drain_ends_in_an_error_not_in_a_cut(tmp_path):
    worker = Worker(tmp_path, free_port(), drain_s=0.3)
    with worker.running() as failure:
        assert failure == ""
        worker.instance.hold_after = 3
        with httpx.stream(
            "POST", f"{worker.address}/v1/chat/completions", json={**CHAT, "stream": True}
        ) as stream:
            lines = (line for line in stream.iter_lines() if line.startswith("data:"))
            next(lines)
            worker.process.send_signal(signal.SIGTERM)
            *_, error, done = lines
        assert json.loads(error[6:])["error"]["code"] == "draining"
        assert done == "data: [DONE]"
        assert worker.process.wait(20) == EXIT_DRAINED


def test_a_taken_port_is_one_line_with_the_remedy(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        worker = Worker(tmp_path, taken.getsockname()[1])
        with worker.running() as failure:
            assert failure.startswith("cannot listen on 127.0.0.1:")
            assert "--port" in failure
            assert worker.process.wait(20) == EXIT_CANNOT_START
            assert b"Traceback" not in worker.process.stderr.read()


def test_importing_the_application_reads_and_starts_nothing(tmp_path):
    code = "import sys, fastapi, aegaeon.proxy as proxy; "
    code += "print('torch' in sys.modules, isinstance(proxy.app, fastapi.FastAPI))"
    settings = {"AEGAEON_CONFIG": str(tmp_path / "nowhere.toml"), "AEGAEON_NONSENSE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == ["False", "True"]
