"""Instances that only prefill and only decode: same answers, whoever of them dies."""

import os
import signal
import threading

import httpx
import pytest

from tests.support.polling import eventually
from tests.support.server import Server, Streamed
from tests.support.smollm2 import smollm2_directory

SPLIT = ("--colocated-count", "0", "--prefill-count", "1", "--decode-count", "1")
PREFILLS, DECODES = "instance-0", "instance-1"
TOKENS = 400


@pytest.fixture(scope="module")
def alone(checkpoints, tmp_path_factory):
    """What one colocated instance answers."""
    with Server(tmp_path_factory.mktemp("alone"), checkpoints) as server:
        return {
            name: Streamed(server.url, name, "a device", TOKENS).whole() for name in checkpoints
        }


def test_a_prefilled_request_is_decoded_elsewhere_with_the_same_tokens(
    checkpoints, tmp_path, alone
):
    with Server(tmp_path, checkpoints, *SPLIT) as server:
        streams = {name: Streamed(server.url, name, "a device", TOKENS) for name in checkpoints}
        assert {name: stream.whole() for name, stream in streams.items()} == alone
        for stream in streams.values():
            assert stream.instances[-1] == DECODES
            assert set(stream.instances) <= {PREFILLS, DECODES}
        eventually(lambda: server.requests() == 0)
        assert b"prefilling again" not in server.log.read_bytes()


@pytest.mark.parametrize("victim", [PREFILLS, pytest.param(DECODES, marks=pytest.mark.thorough)])
def test_killing_either_side_breaks_no_stream(checkpoints, tmp_path, alone, victim):
    with Server(tmp_path, checkpoints, *SPLIT) as server:
        streams = {name: Streamed(server.url, name, "a device", TOKENS) for name in checkpoints}
        eventually(lambda: all(s.has_begun for s in streams.values()), within_s=30)
        os.kill(server.instance_pids()[victim], signal.SIGKILL)
        late = Streamed(server.url, "ada", "a device", TOKENS)
        assert late.whole() == alone["ada"]
        assert {name: stream.whole() for name, stream in streams.items()} == alone
        eventually(lambda: server.requests() == 0)


@pytest.mark.thorough
def test_random_kills_of_all_roles_lose_no_request(checkpoints, tmp_path, alone):
    flags = ("--colocated-count", "1", "--prefill-count", "1", "--decode-count", "1")
    with Server(tmp_path, checkpoints, *flags) as server:
        names = [*checkpoints] * 3
        streams = [Streamed(server.url, name, "a device", TOKENS) for name in names]
        pause = threading.Event()
        for number in (2, 1, 0, 2):
            pause.wait(0.4)
            pid = server.instance_pids().get(f"instance-{number}")
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
        assert [stream.whole() for stream in streams] == [alone[name] for name in names]
        eventually(lambda: server.requests() == 0)


def test_a_cancel_reaches_a_request_that_has_moved(checkpoints, tmp_path):
    with Server(tmp_path, checkpoints, *SPLIT) as server:
        body = {"model": "ada", "prompt": "a", "max_tokens": 4000, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            eventually(lambda: DECODES in next(lines), within_s=30)
        eventually(lambda: server.requests() == 0)


@pytest.mark.thorough
def test_a_real_checkpoint_is_handed_over_with_the_same_tokens(tmp_path):
    models = {"smol": smollm2_directory()}
    prompt = "The capital of France is"
    with Server(tmp_path, models) as server:
        expected = Streamed(server.url, "smol", prompt, 24).whole()
    with Server(tmp_path, models, *SPLIT) as server:
        stream = Streamed(server.url, "smol", prompt, 24)
        assert stream.whole() == expected
        assert stream.instances[-1] == DECODES
