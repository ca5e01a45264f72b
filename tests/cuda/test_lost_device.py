"""A device that is lost ends what computes on it, at once and with one clear line."""

import os
import subprocess
import sys
import time

import msgspec
import pytest

from aegaeon.config import check_settings
from aegaeon.errors import DeviceLost
from aegaeon.instance.launch import EXIT_DEVICE_LOST, Launch
from aegaeon.models.references import resolve
from aegaeon.store.domains import claim_domain
from aegaeon.types import Decode, Load, Loaded, Prefill
from tests.support import cuda_worker
from tests.support.checkpoints import make_checkpoint
from tests.support.cuda_stand_in import EAGER, cuda_device, open_beside, stand_in
from tests.support.decoder import make_request
from tests.support.regions import own_regions
from tests.support.sanitized import ROOT

GB = 1e9
KV_GB = 0.001
# A load that is tried again takes half a minute, one that is told of a lost device none.
SOON_S = 30.0


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = (make_checkpoint(root / name, "llama", seed=ord(name[0])) for name in ("ada", "bob"))
    return tuple(resolve(str(path), str(root)) for path in made)


def settings_of(specs, **changes):
    largest_gb = max(spec.weight_bytes for spec in specs) / GB
    chosen = {
        "device": "cuda:0",
        "threads_per_instance": 1,
        "model_cache_budget_gb": 3 * largest_gb,
        "kv_budget_gb": KV_GB,
        "device_memory_gb": KV_GB + 2.5 * largest_gb,
    }
    return check_settings(chosen | changes)


def with_engine(specs, scenario):
    """Call `scenario` with an engine that has the first model and a request for it, and the
    stand-in; all is given back after it."""

    def run(module, regions):
        engine = open_beside(settings_of(specs), specs, regions)
        try:
            assert isinstance(engine.load(Load(specs[0].id)), Loaded)
            engine.submit(make_request("r", [3, 5, 8], model=specs[0].id))
            engine.execute(Prefill(specs[0].id, ("r",)))
            scenario(engine, module)
        finally:
            engine.close()

    with cuda_device(EAGER) as module, own_regions() as regions:
        run(module, regions)


def test_a_step_and_a_load_are_told_at_once(specs):
    def scenario(engine, module):
        module.lose_device(1)
        began_s = time.monotonic()
        with pytest.raises(DeviceLost, match="another one has to be started"):
            engine.execute(Decode(specs[0].id, ("r",)))
        for _ in range(2):  # and not model after model
            with pytest.raises(DeviceLost):
                engine.load(Load(specs[1].id))
        assert time.monotonic() - began_s < SOON_S

    with_engine(specs, scenario)


@pytest.mark.parametrize("call", [2, 5, 9, 14])
def test_a_load_under_way_is_told_and_not_tried_again(specs, call):
    def scenario(engine, module):
        module.lose_device(call)
        began_s = time.monotonic()
        with pytest.raises(DeviceLost):
            for _ in range(5):
                engine.load(Load(specs[1].id, evict=(specs[1].id,)))
        assert time.monotonic() - began_s < SOON_S

    with_engine(specs, scenario)


# By the runtime's own codes. The last one is of a failure within the driver.
@pytest.mark.parametrize("code", [214, 226, 700, 702, 710, 716, 719, 721, 999])
def test_what_a_device_says_last_is_known(code):
    assert stand_in().is_sticky(code)


# Bad values, no memory, a system that refuses, a recording that was spoiled.
@pytest.mark.parametrize("code", [0, 1, 2, 304, 600, 712, 800, 801, 900, 901])
def test_what_a_device_survives_is_known(code):
    assert not stand_in().is_sticky(code)


def test_torchs_own_words_for_it_are_understood(specs, monkeypatch):
    """Torch raises RuntimeError for whatever a device tells it."""

    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def scenario(engine, module):
        engine.submit(make_request("s", [3, 5, 8], model=specs[0].id))
        monkeypatch.setattr(engine._device, "sample", fail)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            engine.execute(Decode(specs[0].id, ("r",)))  # the device says that it is well
        monkeypatch.setattr(engine._weights, "bring_in", fail)
        module.lose_device(1)
        with pytest.raises(DeviceLost):
            engine.load(Load(specs[1].id))
        with pytest.raises(DeviceLost):
            engine.execute(Decode(specs[0].id, ("s",)))
        monkeypatch.undo()

    with_engine(specs, scenario)


def test_an_instance_ends_with_a_clear_line(specs):
    stand_in()  # built here, where its absence skips the test
    settings = settings_of(specs, domain=f"lost-{os.getpid()}", preload_models=True)
    claim = claim_domain(settings)
    reading, writing = os.pipe()
    try:
        launch = Launch(
            settings=settings,
            specs=specs,
            instance="instance-0",
            index=0,
            incarnation=1,
            status_fd=writing,
            parent_pid=os.getpid(),
        )
        ended = subprocess.run(
            [sys.executable, "-m", "tests.support.cuda_worker"],
            input=msgspec.json.encode(launch),
            capture_output=True,
            pass_fds=(writing,),
            env={**os.environ, cuda_worker.LOSE: "5"},
            cwd=ROOT,
            timeout=60,
            check=False,
        )
    finally:
        os.close(reading)
        os.close(writing)
        claim.release()
    told = ended.stderr.decode()
    assert ended.returncode == EXIT_DEVICE_LOST, told
    [line] = [line for line in told.splitlines() if " CRITICAL " in line]
    assert "cuda:0 is lost, so this instance ends" in line and "IllegalAddress" in line
    assert "Traceback" not in told
