"""A proxy over the local store with scripted instances: in memory, or on a port of its own."""

import asyncio
import json
import threading
import time
from contextlib import asynccontextmanager, contextmanager

import httpx
import uvicorn

from aegaeon.config import check_settings
from aegaeon.proxy.application import create_app
from aegaeon.proxy.http_limits import HttpBounds, bounded_http
from aegaeon.proxy.tokenizer import TextModel
from aegaeon.store.local import LocalDomain
from aegaeon.types import ModelSpec
from tests.support.checkpoints import make_config, write_tokenizer
from tests.support.fake_instance import FakeInstance

CONTEXT_TOKENS = 256
# What an answer says of its waits where the instance says nothing.
NOT_WAITED = {
    **{"instance": "instance-0", "queue_ms": 0.0, "switch_ms": 0.0, "switches": 0},
    **{"preempted_ms": 0.0, "cached_tokens": 0},
}
TEXT = "The quick brown fox, größer als 世界, jumps over the lazy dog."


def write_text_model(directory, template=None, **changes):
    """Write the text side of a model; returns its directory."""
    directory.mkdir(parents=True, exist_ok=True)
    config = make_config("llama")
    write_tokenizer(directory, config)
    (directory / "config.json").write_text(json.dumps(config))
    file = directory / "tokenizer_config.json"
    values = {**json.loads(file.read_text()), **changes}
    if template is not None:
        values["chat_template"] = template
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return directory


class Proxy:
    """The application with one instance `instance-0`, which answers every request with TEXT."""

    def __init__(
        self, directory, models=("m", "org/other"), context_tokens=CONTEXT_TOKENS, **settings
    ):
        root = write_text_model(directory / "m")
        self.text = TextModel(str(root))
        self.specs = tuple(
            ModelSpec(
                id=name,
                path=str(root),
                architecture="LlamaForCausalLM",
                weight_bytes=1,
                kv_token_bytes=1,
                context_tokens=context_tokens,
                vocab_tokens=384,
            )
            for name in models
        )
        self.answer = self.text.encode(TEXT)
        self.settings = check_settings({"colocated_count": 1, **settings})
        self.domain = LocalDomain()
        self.app = create_app(self.settings, self.specs, self.domain)
        self.instances = []

    def add_instance(self, **options):
        names = tuple(spec.id for spec in self.specs)
        reply = options.pop("reply", lambda _: (*self.answer, *self.text.stop_token_ids[:1]))
        self.instances.append(FakeInstance(self.domain, reply, models=names, **options))
        return self.instances[-1]

    @property
    def instance(self):
        return self.instances[0]

    @property
    def service(self):
        return self.app.state.service

    def stop_instances(self):
        for instance in self.instances:
            instance.die()


@asynccontextmanager
async def in_memory(proxy):
    """A client of `proxy` without sockets."""
    proxy.add_instance()
    transport = httpx.ASGITransport(proxy.app)
    try:
        async with (
            proxy.app.router.lifespan_context(proxy.app),
            httpx.AsyncClient(
                transport=transport, base_url="http://127.0.0.1", timeout=30
            ) as client,
        ):
            await asyncio.sleep(0)
            yield client
    finally:
        proxy.stop_instances()


@contextmanager
def listening(proxy, bounds=None):
    """Serve `proxy` from a thread on a free port; yields its address. `bounds` on HTTP as a server
    has them, unless others are given."""
    proxy.add_instance()
    config = uvicorn.Config(
        proxy.app,
        port=0,
        log_config=None,
        lifespan="on",
        access_log=False,
        http=bounded_http(bounds or HttpBounds()),
        ws="none",
        timeout_graceful_shutdown=5,
    )
    server = proxy.server = uvicorn.Server(config)
    server.capture_signals = _no_signals
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline_s = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline_s
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
        proxy.stop_instances()
        assert not thread.is_alive(), "the server did not stop"


@contextmanager
def _no_signals():
    yield
