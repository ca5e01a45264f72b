"""Servers on a CUDA device answer as those on the CPU do, also when instances are killed: on the
stand-in for a device, and on cuda:0."""

import os
import signal

import pytest

from tests.support.checkpoints import make_checkpoint
from tests.support.cuda_device import DEVICE, ON_DEVICE, STAND_IN, use_cuda, why_no_device
from tests.support.polling import eventually
from tests.support.sanitized import ROOT
from tests.support.server import Server, Streamed

SPLIT = ("--colocated-count", "0", "--prefill-count", "1", "--decode-count", "1")
PREFILLS, DECODES = "instance-0", "instance-1"
# Room for both models, and for what is asked.
ON_CUDA = ("--device", "cuda:0", "--kv-budget-gb", "0.03", "--device-memory-gb", "0.2")
ON_CUDA += ("--model-cache-budget-gb", "0.05")
TOKENS = 60
PROMPT = "The quick brown fox jumps over the lazy dog. " * 3
KINDS = (pytest.param(STAND_IN, marks=pytest.mark.thorough), ON_DEVICE)


@pytest.fixture(scope="module", params=KINDS)
def environment(request):
    """What a server is to find in its environment for a device."""
    if request.param != DEVICE:
        with use_cuda(request.param):  # so that it is built, once, or the test is skipped
            pass
        return {"PYTHONPATH": f"{ROOT / 'tests/support/stand_in_site'}:{ROOT}"}
    if reason := why_no_device(is_torch_needed=True):
        pytest.skip(reason)
    return {}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    widths = {"hidden_size": 128, "num_attention_heads": 2, "head_dim": 64}
    return {
        name: make_checkpoint(root / name, family, seed=seed, **widths)
        for seed, (name, family) in enumerate({"ada": "llama", "bob": "qwen3"}.items())
    }


@pytest.fixture(scope="module")
def on_cpu(checkpoints, tmp_path_factory):
    """What one instance on the CPU answers."""
    with Server(tmp_path_factory.mktemp("alone"), checkpoints) as server:
        return {name: Streamed(server.url, name, PROMPT, TOKENS).whole() for name in checkpoints}


def test_models_that_take_turns_answer_as_on_the_cpu(environment, checkpoints, on_cpu, tmp_path):
    with Server(tmp_path, checkpoints, *ON_CUDA, environment=environment) as server:
        streams = {name: Streamed(server.url, name, PROMPT, TOKENS) for name in checkpoints}
        assert {name: stream.whole() for name, stream in streams.items()} == on_cpu


def test_kv_is_handed_on_within_the_device(environment, checkpoints, on_cpu, tmp_path):
    only = {"ada": checkpoints["ada"]}
    with Server(tmp_path, only, *ON_CUDA, *SPLIT, environment=environment) as server:
        streams = [Streamed(server.url, "ada", PROMPT, TOKENS) for _ in range(3)]
        assert [stream.whole() for stream in streams] == [on_cpu["ada"]] * 3
        assert {stream.instances[-1] for stream in streams} == {DECODES}
        eventually(lambda: server.requests() == 0)
        said = server.log.read_bytes()
        assert b"by the host's memory" not in said and b"prefilling again" not in said
        eventually(lambda: server.statuses()[DECODES].moved["kv_in"].count == 3)
        assert server.statuses()[PREFILLS].moved["kv_out"].count == 0


@pytest.mark.parametrize("victim", [PREFILLS, DECODES])
def test_killing_either_side_breaks_no_stream(environment, checkpoints, on_cpu, tmp_path, victim):
    with Server(tmp_path, checkpoints, *ON_CUDA, *SPLIT, environment=environment) as server:
        streams = {name: Streamed(server.url, name, PROMPT, TOKENS) for name in checkpoints}
        eventually(lambda: all(s.has_begun for s in streams.values()), within_s=60)
        os.kill(server.instance_pids()[victim], signal.SIGKILL)
        late = Streamed(server.url, "ada", PROMPT, TOKENS)
        assert late.whole() == on_cpu["ada"]
        assert {name: stream.whole() for name, stream in streams.items()} == on_cpu
        eventually(lambda: server.requests() == 0)
