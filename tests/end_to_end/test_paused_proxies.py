"""A proxy that stands for longer than instances keep what they have for it: its streams go on."""

import os
import signal
import textwrap
import time

import pytest

from tests.support.polling import eventually
from tests.support.server import ROOT, Server, Streamed

TOKENS = 1500
GONE_S = 1.0  # after which an instance gives a proxy up that takes nothing
SILENCE_S = 1.5


def impatient(directory):
    """Have mailboxes be small, and everybody lose patience soon. Returns the environment in which
    that is so."""
    (directory / "sitecustomize.py").write_text(
        textwrap.dedent(f"""
            import sys
            if "aegaeon.instance.worker" in sys.orig_argv:
                from aegaeon.instance import outbox
                outbox.GONE_S = {GONE_S}
            if "aegaeon.proxy.worker" in sys.orig_argv:
                from aegaeon.proxy import living
                from aegaeon.store.shm import ShmDomain
                living.SILENCE_S = {SILENCE_S}
                create = ShmDomain.create_mailbox
                def small(self, address, capacity_bytes=0, look_s=0.0):
                    return create(self, address, 1 << 16, look_s)
                ShmDomain.create_mailbox = small
            """)
    )
    return {"PYTHONPATH": f"{directory}:{ROOT}"}


@pytest.mark.thorough
def test_streams_go_on_that_were_given_up_while_their_proxy_stood(checkpoints, tmp_path):
    with Server(tmp_path, checkpoints, environment=impatient(tmp_path)) as server:
        whole = {m: Streamed(server.url, m, "the device", TOKENS).whole() for m in checkpoints}
        streams = [Streamed(server.url, model, "the device", TOKENS) for model in checkpoints]
        eventually(lambda: any(stream.has_begun for stream in streams), within_s=30)
        proxy = server.proxy_pid()
        os.kill(proxy, signal.SIGSTOP)
        try:
            gone = b"destination takes nothing"
            eventually(lambda: gone in server.log.read_bytes(), within_s=60)
            eventually(lambda: server.requests() == 0, within_s=10)
        finally:
            os.kill(proxy, signal.SIGCONT)
        went_on_s = time.monotonic()
        assert [stream.whole() for stream in streams] == [whole[model] for model in checkpoints]
        assert time.monotonic() - went_on_s < 60
        assert server.proxy_pid() == proxy
