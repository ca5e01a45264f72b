"""Kills processes that load, pin, read, evict and make memory ready at random; checks what they
leave behind.

Run as a program: `kill_loaders.py DIRECTORY SEED KILLS`; DIRECTORY is for the models' files. Prints
how many died holding the lock, in the middle of a load, and making memory ready.
"""

import contextlib
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np

from aegaeon import _native
from aegaeon.errors import BudgetTooSmall
from tests.support.bring_in import CacheRequest, bring_in
from tests.support.weight_files import Plan, key

PATH = Path(f"/dev/shm/aegaeon-kill-{os.getpid()}.weights")
LOCK_OFFSET = 4096
PLAYERS = 4
MODELS = 8
STAGES, STAGE_BYTES = 6, (1 << 19) + 320
MODEL_BYTES = STAGES * STAGE_BYTES
HUGE_BYTES = 1 << 21
BUDGET_BYTES = 3 * MODEL_BYTES + 6 * HUGE_BYTES


def make_plans(directory: Path) -> list[Plan]:
    """Return a plan per model, whose bytes are all its number."""
    plans = []
    for number in range(MODELS):
        plan = Plan(directory / f"model-{number}")
        for _ in range(STAGES):
            plan.add(np.full((1, STAGE_BYTES), number + 1, np.uint8))
        plans.append(plan.write())
    return plans


def open_cache() -> _native.WeightCache:
    return _native.WeightCache.open_or_create(str(PATH), BUDGET_BYTES)


def use(cache: _native.WeightCache, plans: list[Plan], number: int, timeout_s: float) -> None:
    """Bring a model in and hold every byte of it against the file."""
    request = CacheRequest(key(number), f"model {number}", MODEL_BYTES, STAGES)
    model = bring_in(cache, request, lambda: plans[number].jobs, 2, timeout_s)
    assert (np.frombuffer(model, np.uint8) == number + 1).all(), "torn"
    model.unpin()
    model.close()


def play(plans: list[Plan], seed: int) -> None:
    rng = random.Random(seed)
    cache = open_cache()
    while True:
        number = rng.randrange(MODELS)
        cache.set_demand(key(number), rng.random() < 0.5)
        try:
            use(cache, plans, number, 20.0)
        except BudgetTooSmall as error:
            sys.stderr.write(f"{error}\n")
            raise
        if rng.random() < 0.3:
            cache.evict(key(rng.randrange(MODELS)))
        cache.prepare(rng.choice((HUGE_BYTES, MODEL_BYTES, BUDGET_BYTES)))


def start(plans: list[Plan], seed: int) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            _native.die_with_parent(signal.SIGKILL, parent)
            play(plans, seed)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == -signal.SIGKILL, f"a player ended by itself: {status}"


def lock_holder() -> int:
    with PATH.open("rb") as file:
        file.seek(LOCK_OFFSET)
        return int.from_bytes(file.read(8), "little") >> 42


def resident_bytes() -> int:
    found = {}  # by inode: a file may get another name while we look
    for file in PATH.parent.glob(f"{PATH.name}+*"):
        with contextlib.suppress(FileNotFoundError):
            status = file.stat()
            found[status.st_ino] = status.st_blocks * 512
    return sum(found.values())


def run(plans: list[Plan], seed: int, kills: int) -> tuple[int, int, int]:
    rng = random.Random(seed)
    cache = open_cache()
    players = [start(plans, seed * 1000 + number) for number in range(PLAYERS)]
    holding = loading = preparing = 0
    try:
        for number in range(kills):
            end = time.monotonic() + rng.random() * 0.03
            while time.monotonic() < end:
                assert resident_bytes() <= BUDGET_BYTES, "more than the budget"
                assert cache.used_bytes <= BUDGET_BYTES
            pid = players.pop(rng.randrange(PLAYERS))
            kill(pid)
            holding += lock_holder() == pid
            loading += any(entry.state == "loading" for entry in cache.status())
            preparing += cache.ready_bytes < cache.spare_bytes
            players.append(start(plans, seed * 1000 + PLAYERS + number))
    finally:
        for pid in players:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    end_well(cache, plans)
    return holding, loading, preparing


def end_well(cache: _native.WeightCache, plans: list[Plan]) -> None:
    """Nothing is pinned or half done for good, and every model can be had."""
    assert all(entry.pin_pids == [] == entry.demand_pids for entry in cache.status())
    for number in range(MODELS):
        use(cache, plans, number, 10.0)
    assert resident_bytes() <= cache.used_bytes + cache.spare_bytes <= BUDGET_BYTES
    for number in range(MODELS):
        cache.evict(key(number))
    assert cache.status() == []
    assert cache.used_bytes == 0
    assert cache.prepare(BUDGET_BYTES)
    assert resident_bytes() == cache.ready_bytes == cache.spare_bytes > BUDGET_BYTES - HUGE_BYTES
    assert [file.name for file in PATH.parent.glob(f"{PATH.name}+*")] == [f"{PATH.name}+spare"]
    numbers = [one.number for one in cache.evictions()]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def main() -> int:
    directory, seed, kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    try:
        holding, loading, preparing = run(make_plans(directory), seed, kills)
    finally:
        for file in PATH.parent.glob(f"{PATH.name}*"):
            file.unlink()
    where = f"{holding} holding the lock, {loading} in a load, {preparing} making memory ready"
    sys.stdout.write(f"{kills} killed, {where}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
