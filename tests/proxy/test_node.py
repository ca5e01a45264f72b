"""`uvicorn aegaeon.proxy:app` where no server lives: it brings its own instances, and takes them
away again."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest

from aegaeon.cli import main
from aegaeon.config import check_settings
from aegaeon.errors import StoreUnavailable
from aegaeon.proxy.gateway import Gateway
from aegaeon.proxy.keys import checked_key, create_key
from aegaeon.proxy.node import started_gateway
from aegaeon.store.domains import domain_is_live
from aegaeon.store.local import LocalDomain
from tests.support.checkpoints import make_checkpoint
from tests.support.fake_instance import FakeInstance, wait_until
from tests.support.proxy_server import Proxy

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@contextmanager
def uvicorn_process(port, *flags, **settings):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AEGAEON_")}
    environment |= {f"AEGAEON_{name.upper()}": value for name, value in settings.items()}
    command = [sys.executable, "-m", "uvicorn", "aegaeon.proxy:app", "--port", str(port), *flags]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def is_up(address):
    try:
        return httpx.get(f"{address}/health").status_code == 200
    except httpx.TransportError:
        return False


def test_uvicorn_starts_and_stops_instances_of_its_own(tmp_path):
    model = make_checkpoint(tmp_path / "m")
    port, domain = free_port(), f"test-node-{os.getpid()}"
    address = f"http://127.0.0.1:{port}"
    options = {"models": f"m={model}", "domain": domain, "device": "null", "drain_s": "5"}
    # The protocol is uvicorn's own choice, unless it is told.
    protocol = ("--http", "aegaeon.proxy.http_limits:BoundedHttp")
    with uvicorn_process(port, *protocol, **options) as process:
        wait_until(lambda: is_up(address) or process.poll() is not None, timeout_s=60)
        long = httpx.get(f"{address}/health", headers={"x-long": "a" * 100_000})
        assert long.status_code == 431
        answer = httpx.post(f"{address}/v1/chat/completions", json=CHAT, timeout=30)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] <= 8
    assert process.returncode in (0, -signal.SIGTERM)
    assert not domain_is_live(check_settings({"domain": domain}))
    assert not list(Path("/dev/shm").glob(f"aegaeon-{domain}*"))


def test_several_that_start_at_once_share_the_instances_of_one(tmp_path):
    model, domain = make_checkpoint(tmp_path / "m"), f"test-node-many-{os.getpid()}"
    options = {"models": f"m={model}", "domain": domain, "device": "null", "drain_s": "5"}
    ports = [free_port() for _ in range(3)]
    with ExitStack() as stack:
        several = [stack.enter_context(uvicorn_process(port, **options)) for port in ports]
        for port, process in zip(ports, several, strict=True):
            address = f"http://127.0.0.1:{port}"
            wait_until(lambda: is_up(address) or process.poll() is not None, timeout_s=60)  # noqa: B023
            answer = httpx.post(f"{address}/v1/chat/completions", json=CHAT, timeout=30)
            assert answer.status_code == 200, answer.text


def test_settings_that_cannot_be_end_uvicorn_with_the_reason():
    with uvicorn_process(free_port(), models="") as process:
        _, log = process.communicate(timeout=60)
    assert process.returncode == 3
    assert b"cannot start: no models to serve; set AEGAEON_MODELS" in log
    assert b"Traceback" not in log


def test_uvicorn_alone_asks_for_keys(tmp_path):
    model, file = make_checkpoint(tmp_path / "m"), tmp_path / "keys.json"
    secret = create_key(file, checked_key({"name": "a"}))
    port, domain = free_port(), f"test-node-keys-{os.getpid()}"
    address = f"http://127.0.0.1:{port}"
    options = {"models": f"m={model}", "domain": domain, "device": "null", "keys_file": str(file)}
    with uvicorn_process(port, **options) as process:
        wait_until(lambda: is_up(address) or process.poll() is not None, timeout_s=60)
        path = f"{address}/v1/chat/completions"
        assert httpx.post(path, json=CHAT, timeout=30).status_code == 401
        own = {"Authorization": f"Bearer {secret}"}
        assert httpx.post(path, json=CHAT, timeout=30, headers=own).status_code == 200
        assert httpx.get(f"{address}/admin/decisions", headers=own).status_code == 403


def test_a_store_that_is_silent_at_the_start_is_waited_for(tmp_path, monkeypatch):
    proxy = Proxy(tmp_path)
    make, refusals = proxy.domain.metadata, 2

    def metadata():
        nonlocal refusals
        refusals -= 1
        if refusals >= 0:
            raise StoreUnavailable("it does not answer")
        return make()

    monkeypatch.setattr(proxy.domain, "metadata", metadata)
    monkeypatch.setattr("aegaeon.proxy.node._RETRY_S", 0.01)

    async def test():
        proxy.instances.append(instance)
        async with proxy.app.router.lifespan_context(proxy.app):
            return proxy.service.gateway.is_ready()

    with monkeypatch.context() as before:
        before.setattr(proxy.domain, "metadata", make)
        instance = FakeInstance(proxy.domain, lambda _: (1,))
    try:
        assert asyncio.run(asyncio.wait_for(test(), 30)) and refusals == -1
    finally:
        proxy.stop_instances()


def test_a_store_that_stays_silent_ends_the_start_within_its_bound():
    domain = LocalDomain()
    domain.metadata = refuse

    async def test():
        make = partial(Gateway, domain, check_settings({}), (), "proxy-0")
        with pytest.raises(StoreUnavailable):
            await started_gateway(make, within_s=0.0)

    asyncio.run(asyncio.wait_for(test(), 30))


def refuse():
    raise StoreUnavailable("it does not answer")


def test_instances_of_no_owner_are_not_started(capsys):
    assert main(["instances", "--owner", str(1 << 30)]) == 2
    assert "--owner 1073741824 is no process that runs" in capsys.readouterr().err
