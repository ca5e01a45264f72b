"""SIGKILL in loads, hand-offs and evictions, and at any time: every stream ends with its tokens."""

import os
import random
import signal
import threading

import pytest

from aegaeon.memory.kv import KvPool, KvShape
from aegaeon.store.names import KV, region_path
from tests.support.bad_disk import BadDisk
from tests.support.polling import eventually
from tests.support.server import Server, Streamed, is_running

ROLES = ("--colocated-count", "1", "--prefill-count", "1", "--decode-count", "1")
# Room for two of the three models, so that every other turn evicts one.
KV_GB = 0.003
SIZES = ("--model-cache-budget-gb", "0.0009", "--kv-budget-gb", str(KV_GB))
DEVICES = {
    "cpu": (),
    "staged": ("--device", "staged", "--device-memory-gb", "0.0038", "--link-gb-per-s", "1"),
}
TURNS = ("--slo-ttft-s", "0.1", "--slo-tbt-s", "0.02")
SHAPE = KvShape(layers=2, kv_heads=2, head_dim=16)  # of all three models
TOKENS = 200
RANDOM_KILLS = 3


@pytest.fixture(scope="module")
def alone(checkpoints, tmp_path_factory):
    """What one instance answers that nobody disturbs."""
    with Server(tmp_path_factory.mktemp("alone"), checkpoints) as server:
        return {
            name: Streamed(server.url, name, "a device", TOKENS).whole() for name in checkpoints
        }


def kill(pid):
    """SIGKILL a process and wait until it is gone."""
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not is_running(pid))
    return pid


def kill_a_loader(server, disk, model):
    """While it reads `model`, of which the first pieces are in already."""
    disk.fails("hang", str(model), first=3)
    eventually(lambda: model.name in server.loaders(), within_s=30)
    pid = kill(server.loaders()[model.name])
    disk.recovers()
    return pid


def kill_one_who_evicts(server, ask):
    """As soon as it has been recorded that it does; what `ask` begins goes on until then.

    Those that live may have all models on their devices: then one that has just come back evicts.
    """
    streams = []
    with server.weights() as cache:

        def last():
            return max((record.number for record in cache.evictions()), default=-1)

        def has_evicted():
            if all(stream.finish_reason for _, stream in streams):
                streams.extend(ask())
            return last() > seen

        seen = last()
        eventually(has_evicted, within_s=60)
        pid = cache.evictions()[-1].pid
    return kill(pid), streams


def kill_after_hand_off(server, stream, who):
    """Kill instance `who`, on either side, as soon as the other has sent a token."""
    eventually(lambda: "instance-2" in stream.instances or stream.finish_reason, within_s=30)
    return {kill(pid) for name, pid in server.instance_pids().items() if name == who}


def assert_nothing_is_held_by_the_dead(server, killed):
    with server.weights() as cache:
        for entry in cache.status():
            assert not killed & set(entry.pin_pids) and not killed & set(entry.demand_pids)
    path = region_path(server.shared_memory, server.domain, KV)
    pool = KvPool(3 * round(KV_GB * 1e9), [SHAPE], str(path))
    try:

        def is_all_free():
            pool._native.reclaim()
            return pool.free_blocks(SHAPE) == pool.capacity_blocks(SHAPE) > 0

        eventually(is_all_free)  # the living give back a little later than streams end
    finally:
        pool.close()


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.thorough), "staged"])
def test_kills_in_every_phase_change_no_token_and_leave_nothing_held(
    checkpoints, tmp_path, alone, device
):
    disk = BadDisk(tmp_path)
    flags = (*ROLES, *SIZES, *TURNS, *DEVICES[device])
    with Server(tmp_path, checkpoints, *flags, environment=disk.environment) as server:

        def start(*names):
            return [(name, Streamed(server.url, name, "a device", TOKENS)) for name in names]

        def finish(streams):
            """No request is hit more often than the proxy sends it again."""
            for name, stream in streams:
                assert stream.whole() == alone[name]

        streams = start(*checkpoints)
        killed = {kill_a_loader(server, disk, checkpoints["cleo"])}
        finish(streams)
        for who, name in (("instance-1", "ada"), ("instance-2", "bob")):
            streams = start(name, *checkpoints)
            killed |= kill_after_hand_off(server, streams[0][1], who)
            finish(streams)
        pid, streams = kill_one_who_evicts(server, lambda: start(*checkpoints, *checkpoints))
        killed.add(pid)
        finish(streams)
        moments = random.Random(3)
        for _ in range(RANDOM_KILLS):
            streams = start(*checkpoints)
            threading.Event().wait(moments.uniform(0.0, 0.5))
            pids = sorted(server.instance_pids().values())
            killed.add(kill(moments.choice(pids)) if pids else 0)
            finish(streams)
        eventually(lambda: server.requests() == 0)
        assert_nothing_is_held_by_the_dead(server, killed)
