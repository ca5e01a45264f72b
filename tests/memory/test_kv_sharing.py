"""Clients of one pool: hand-off by ids, quotas, the dead, and what does not fit together."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aegaeon import _native
from aegaeon.errors import OutOfBlocks, RegionError, RegionMismatch
from aegaeon.memory.kv import KvPool, KvShape
from aegaeon.store.names import domain_of

SHAPE = KvShape(2, 2, 16)
OTHER = KvShape(3, 1, 80)
SHAPES = (SHAPE, OTHER)
BUDGET = 200_000
KILL_CLIENTS = Path(__file__).parent.parent / "support" / "kill_kv_clients.py"
NUMBERS = count()


def remove(path: str) -> None:
    for name in (path, f"{path}+arena"):
        _native.unlink(name)


@pytest.fixture
def path() -> Iterator[str]:
    name = f"/dev/shm/aegaeon-test-kv-{os.getpid()}-{next(NUMBERS)}.kv"
    yield name
    remove(name)


def filled(pool: KvPool, blocks: list[int], value: float) -> list[int]:
    for block in blocks:
        pool.pages(SHAPE)[block : block + SHAPE.block_pages] = value
    return blocks


def holds(pool: KvPool, blocks: list[int], value: float) -> bool:
    pages = pool.pages(SHAPE)
    return all(pages[b : b + SHAPE.block_pages].eq(value).all() for b in blocks)


def test_a_receiver_takes_blocks_where_they_lie(path):
    sender, receiver = KvPool(BUDGET, SHAPES, path), KvPool(BUDGET, SHAPES, path)
    blocks = filled(sender, sender.allocate(SHAPE, 5), 3.0)
    offer = sender.offer(SHAPE, blocks)
    assert sender.used_bytes == 5 * SHAPE.block_bytes
    assert receiver.take(SHAPE, blocks, offer)
    assert (sender.used_bytes, receiver.used_bytes) == (0, 5 * SHAPE.block_bytes)
    sender.free(SHAPE, blocks)
    assert holds(receiver, blocks, 3.0)
    assert not receiver.take(SHAPE, blocks, offer)
    receiver.free(SHAPE, blocks)
    assert receiver.free_blocks(SHAPE) == sender.free_blocks(SHAPE) == sender.capacity_blocks(SHAPE)


def test_a_take_of_which_one_block_is_missing_takes_none(path):
    sender, receiver = KvPool(BUDGET, SHAPES, path), KvPool(BUDGET, SHAPES, path)
    blocks = sender.allocate(SHAPE, 4)
    sender.free(SHAPE, blocks[2:3])
    assert not receiver.take(SHAPE, blocks, sender._native.identity)
    assert (sender.used_bytes, receiver.used_bytes) == (3 * SHAPE.block_bytes, 0)
    assert not receiver.take(SHAPE, blocks[:1] * 2, sender._native.identity)
    assert receiver.take(SHAPE, blocks[:2], sender._native.identity)
    sender.free(SHAPE, blocks)
    receiver.free(SHAPE, blocks)
    assert sender.used_bytes == receiver.used_bytes == 0


def test_an_offer_is_void_once_a_block_was_freed_and_given_out_anew(path):
    sender, receiver = KvPool(BUDGET, SHAPES, path), KvPool(BUDGET, SHAPES, path)
    blocks = sender.allocate(SHAPE, 2)
    offer = sender.offer(SHAPE, blocks)
    sender.free(SHAPE, blocks)
    assert sorted(sender.allocate(SHAPE, 2)) == sorted(blocks)
    assert not receiver.take(SHAPE, blocks, offer)
    renewed = sender.offer(SHAPE, blocks)
    assert renewed != sender.offer(SHAPE, blocks)
    assert not receiver.take(SHAPE, blocks, renewed)
    sender.free(SHAPE, blocks[:1])
    assert sender.offer(SHAPE, blocks) is None


def test_ids_of_another_shape_or_nobodys_identity_take_nothing(path):
    sender, receiver = KvPool(BUDGET, SHAPES, path), KvPool(BUDGET, SHAPES, path)
    blocks = sender.allocate(SHAPE, 1)
    for identity in (
        0,
        2**64 - 1,
        sender._native.identity | 0xFFFFFFFE << 32,
        receiver._native.identity,
    ):
        assert not receiver.take(SHAPE, blocks, identity)
    # The first block of slab 0 has one id in both shapes.
    assert blocks == [0]
    assert not receiver.take(OTHER, [0], sender._native.identity)
    receiver.free(SHAPE, blocks)
    sender.free(OTHER, [0])
    assert sender.used_bytes == SHAPE.block_bytes


def test_no_client_gets_more_than_its_share(path):
    share = 4 * SHAPE.block_bytes
    first = KvPool(BUDGET, SHAPES, path, quota_bytes=share)
    second = KvPool(BUDGET, SHAPES, path, quota_bytes=share)
    assert first.free_blocks(SHAPE) == first.capacity_blocks(SHAPE) == 4
    blocks = first.allocate(SHAPE, 4)
    with pytest.raises(OutOfBlocks, match=r"need 1 .* 0 of .* this client's share"):
        first.allocate(SHAPE, 1)
    own = second.allocate(SHAPE, 2)
    with pytest.raises(OutOfBlocks, match="need 4 "):
        second.take(SHAPE, blocks, first._native.identity)
    assert first.used_bytes == share
    assert second.take(SHAPE, blocks[:2], first._native.identity)
    # What was taken from a client counts no more against it.
    assert len(first.allocate(SHAPE, 2)) == 2
    second.free(SHAPE, own + blocks[:2])
    assert second.free_blocks(SHAPE) == 4


def test_clients_share_slabs_so_that_none_wants_while_blocks_are_free(path):
    first, second = KvPool(BUDGET, SHAPES, path), KvPool(BUDGET, SHAPES, path)
    blocks = first.allocate(SHAPE, first.capacity_blocks(SHAPE))
    first.free(SHAPE, blocks[1::2])
    assert sorted(second.allocate(SHAPE, len(blocks[1::2]))) == sorted(blocks[1::2])


def test_closing_gives_everything_back_zeroed(path):
    first, second = KvPool(BUDGET, SHAPES, path), KvPool(BUDGET, SHAPES, path)
    blocks = filled(first, first.allocate(SHAPE, 3), torch.nan)
    first.close()
    assert second.free_blocks(SHAPE) == second.capacity_blocks(SHAPE)
    assert holds(second, blocks, 0.0)


def test_other_sizes_and_foreign_files_are_refused(path):
    with KvPoolOpen(path):
        for budget, shapes in ((BUDGET + 50_000, SHAPES), (BUDGET, (SHAPE,))):
            with pytest.raises(RegionMismatch, match="same models"):
                KvPool(budget, shapes, path)
        arena = Path(f"{path}+arena")
        whole = arena.stat().st_size
        os.truncate(arena, whole + 1)
        with pytest.raises(RegionMismatch, match="arena"):
            KvPool(BUDGET, SHAPES, path)
        arena.unlink()
        with pytest.raises(RegionError, match="arena"):
            KvPool(BUDGET, SHAPES, path)


class KvPoolOpen:
    """A pool that is open while the body runs."""

    def __init__(self, path: str) -> None:
        self.pool = KvPool(BUDGET, SHAPES, path)

    def __enter__(self) -> KvPool:
        return self.pool

    def __exit__(self, *_: object) -> None:
        self.pool.close()


def test_an_arena_that_an_earlier_pool_left_is_not_read(path):
    arena = Path(f"{path}+arena")
    arena.write_bytes(b"\xff" * (BUDGET * 2))
    pool = KvPool(BUDGET, SHAPES, path)
    assert holds(pool, pool.allocate(SHAPE, pool.capacity_blocks(SHAPE)), 0.0)
    assert arena.stat().st_mode & 0o777 == 0o600
    assert domain_of(arena) == domain_of(Path(path))


def test_memory_is_reserved_slab_by_slab(path):
    pool = KvPool(64 << 20, (KvShape(28, 8, 64),), path)
    arena = Path(f"{path}+arena")
    assert arena.stat().st_blocks == 0
    shape = KvShape(28, 8, 64)
    blocks = pool.allocate(shape, 1)
    reserved = arena.stat().st_blocks * 512
    assert pool.slab_bytes <= reserved <= pool.slab_bytes + 8192
    pool.free(shape, blocks)
    pool.allocate(shape, 1)
    assert arena.stat().st_blocks * 512 == reserved


FULL = """
import os
from aegaeon.errors import OutOfBlocks
from aegaeon.memory.kv import KvPool, KvShape
shape = KvShape(28, 8, 64)
pool = KvPool(64 << 20, (shape,), "MOUNT/aegaeon-full.kv")
first = pool.allocate(shape, 3)
with open("MOUNT/filling", "wb", buffering=0) as filling:
    try:
        while True:
            filling.write(bytes(65536))
    except OSError:
        pass
try:
    pool.allocate(shape, pool.slab_blocks(shape))
    raise SystemExit("no error")
except OutOfBlocks as error:
    assert "/dev/shm" in str(error), error
pool.back_ahead(64 << 20)
pool.close()
pool = KvPool(64 << 20, (shape,), "MOUNT/aegaeon-full.kv")
first = pool.allocate(shape, 3)
assert pool.used_bytes == 3 * shape.block_bytes
os.unlink("MOUNT/filling")
assert len(pool.allocate(shape, pool.slab_blocks(shape))) == pool.slab_blocks(shape)
"""


def test_a_full_file_system_is_out_of_blocks_and_nothing_is_lost(tmp_path):
    unshare = shutil.which("unshare")
    mount = f"mount -t tmpfs -o size=24m none {tmp_path}"
    if (
        unshare is None
        or subprocess.run([unshare, "-Urm", "sh", "-c", mount], check=False).returncode
    ):
        pytest.skip("no file system may be mounted here")
    code = FULL.replace("MOUNT", str(tmp_path))
    command = [unshare, "-Urm", "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_forked_child_can_neither_use_nor_free_what_its_parent_holds(path):
    pool = KvPool(BUDGET, SHAPES, path)
    blocks = pool.allocate(SHAPE, 2)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            pool.allocate(SHAPE, 1)
        except RegionError as error:
            status = 0 if "fork" in str(error) else 2
        pool.close()
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert pool.used_bytes == len(blocks) * SHAPE.block_bytes


def test_what_a_killed_client_held_comes_back_zeroed_when_room_is_short(path):
    pool = KvPool(BUDGET, SHAPES, path)
    everything = pool.capacity_blocks(SHAPE)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        other = KvPool(BUDGET, SHAPES, path)
        filled(other, other.allocate(SHAPE, everything), torch.nan)
        os.write(write, b"x")
        signal.pause()
    os.read(read, 1)
    with pytest.raises(OutOfBlocks):
        pool.allocate(SHAPE, 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert holds(pool, pool.allocate(SHAPE, everything), 0.0)
    assert pool._native.reclaim() == 0
    os.close(read)
    os.close(write)


def test_sixty_four_clients_fit_and_the_places_of_those_who_left_are_reused(path):
    pools = [KvPool(BUDGET, SHAPES, path) for _ in range(64)]
    assert len({pool._native.identity for pool in pools}) == 64
    with pytest.raises(RegionError, match="64 live"):
        KvPool(BUDGET, SHAPES, path)
    old = pools.pop()
    old.close()
    assert KvPool(BUDGET, SHAPES, path)._native.identity != old._native.identity


def test_threads_of_one_client_never_hold_the_same_block(path):
    pool = KvPool(BUDGET, SHAPES, path)
    failures: list[str] = []

    def churn(number: int) -> None:
        rng = random.Random(number)
        held: list[int] = []
        for _ in range(400):
            with contextlib.suppress(OutOfBlocks):
                held += filled(pool, pool.allocate(SHAPE, rng.randrange(1, 4)), number)
            if not holds(pool, held, number):
                failures.append("a block has two holders")
            gone = [held.pop(rng.randrange(len(held))) for _ in range(len(held) // 2)]
            pool.free(SHAPE, gone)
        pool.free(SHAPE, held)

    threads = [threading.Thread(target=churn, args=(number,)) for number in range(1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert pool.used_bytes == 0
    assert pool.free_blocks(SHAPE) == pool.capacity_blocks(SHAPE)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(("allocate", "free", "offer", "take", "reopen")),
        st.integers(0, 2), st.integers(0, 2), st.integers(0, 1), st.integers(1, 9),
    ),
    max_size=60,
)  # fmt: skip


@settings(max_examples=40)
@given(STEPS)
def test_clients_agree_with_a_model_of_who_holds_what(steps):
    path = f"/dev/shm/aegaeon-test-kv-{os.getpid()}-{next(NUMBERS)}.kv"
    quota = BUDGET // 2
    try:
        pools = [KvPool(BUDGET, SHAPES, path, quota) for _ in range(3)]
        model: dict[tuple[KvShape, int], int] = {}  # (shape, block) -> holder
        offers: list[tuple[KvShape, list[int], int, int]] = []
        for verb, who, whom, which, number in steps:
            shape, pool = SHAPES[which], pools[who]
            mine = [block for (s, block), holder in model.items() if (s, holder) == (shape, who)]
            match verb:
                case "allocate" if pool.free_blocks(shape) >= number:
                    for block in pool.allocate(shape, number):
                        assert model.setdefault((shape, block), who) == who
                        offers = [o for o in offers if o[0] != shape or block not in o[1]]
                case "allocate":
                    with pytest.raises(OutOfBlocks):
                        pool.allocate(shape, number)
                case "free":
                    theirs = [block for (s, block), holder in model.items() if s == shape]
                    pool.free(shape, theirs[:number])
                    for block in set(theirs[:number]) & set(mine):
                        del model[shape, block]
                case "offer" if mine:
                    offers.append((shape, mine[:number], who, pool.offer(shape, mine[:number])))
                case "take" if offers:
                    take_last(offers, pools, model, whom)
                case "reopen":
                    pool.close()
                    pools[who] = KvPool(BUDGET, SHAPES, path, quota)
                    model = {key: holder for key, holder in model.items() if holder != who}
                    offers = [o for o in offers if o[2] != who]
            for client, other in enumerate(pools):
                held = sum(s.block_bytes for (s, _), holder in model.items() if holder == client)
                assert other.used_bytes == held <= quota
        for pool in pools:
            pool.close()
        assert is_all_free(KvPool(BUDGET, SHAPES, path))
    finally:
        remove(path)


def is_all_free(pool: KvPool) -> bool:
    return all(pool.free_blocks(shape) == pool.capacity_blocks(shape) for shape in SHAPES)


def take_last(offers, pools, model, receiver) -> None:
    shape, blocks, sender, identity = offers.pop()
    still_there = all(model.get((shape, block)) == sender for block in blocks)
    share = pools[receiver].budget_bytes - pools[receiver].used_bytes
    if receiver != sender and len(blocks) * shape.block_bytes > share:
        with pytest.raises(OutOfBlocks):
            pools[receiver].take(shape, blocks, identity)
        return
    assert pools[receiver].take(shape, blocks, identity) == still_there
    if still_there:
        model.update(dict.fromkeys([(shape, block) for block in blocks], receiver))
        # An earlier offer of one of them is void.
        offers[:] = [o for o in offers if o[0] != shape or not set(o[1]) & set(blocks)]


def test_killed_clients_lose_no_block_and_harm_no_other():
    result = subprocess.run(
        [sys.executable, str(KILL_CLIENTS), "150"],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("150 killed")
