"""Servers on staged devices: the same answers as on a CPU, also when instances are killed."""

import os
import signal

import pytest

from tests.support.polling import eventually
from tests.support.server import Server, Streamed

# One model and some of another on a device; less KV than all streams take.
STAGED = ("--device", "staged", "--link-gb-per-s", "0.1", "--model-cache-budget-gb", "0.05")
STAGED += ("--device-memory-gb", "0.0065", "--kv-budget-gb", "0.006")
COLOCATED = ("--colocated-count", "2")
SPLIT = ("--colocated-count", "0", "--prefill-count", "1", "--decode-count", "1")
TOKENS = 300


@pytest.fixture(scope="module")
def alone(checkpoints, tmp_path_factory):
    """What one instance on a CPU answers."""
    with Server(tmp_path_factory.mktemp("alone"), checkpoints) as server:
        return {
            name: Streamed(server.url, name, "a device", TOKENS).whole() for name in checkpoints
        }


def stream_all(server, checkpoints):
    return {name: Streamed(server.url, name, "a device", TOKENS) for name in checkpoints}


@pytest.mark.parametrize(
    ("roles", "victim"),
    [
        (COLOCATED, "instance-0"),
        pytest.param(SPLIT, "instance-0", marks=pytest.mark.thorough),
        pytest.param(SPLIT, "instance-1", marks=pytest.mark.thorough),
    ],
    ids=["colocated", "prefill", "decode"],
)
def test_a_killed_instance_breaks_no_stream(checkpoints, tmp_path, alone, roles, victim):
    with Server(tmp_path, checkpoints, *STAGED, *roles) as server:
        streams = stream_all(server, checkpoints)
        eventually(lambda: all(s.has_begun for s in streams.values()), within_s=30)
        os.kill(server.instance_pids()[victim], signal.SIGKILL)
        late = Streamed(server.url, "ada", "a device", TOKENS)
        assert late.whole() == alone["ada"]
        assert {name: stream.whole() for name, stream in streams.items()} == alone
        eventually(lambda: server.requests() == 0)
