"""Damages regions at random, attaches to them and uses them: only our errors may come of it.

Run as a program: `fuzz_regions.py ROUNDS`. Two ways: a damaged file that is attached anew, and
memory that is damaged under the processes which have it open.
"""

import mmap
import os
import random
import sys
from pathlib import Path

from aegaeon import _native
from aegaeon.errors import AegaeonError
from tests.support.weight_files import planned

HEADER_BYTES = 4096
CONTROL_BYTES = 2048
PATH = f"/dev/shm/aegaeon-fuzz-{os.getpid()}"


def make_ring() -> _native.Ring:
    ring = _native.Ring.create(PATH, 4096)
    for length in (0, 5, 64, 700):
        ring.send(b"r" * length)
    return ring


def make_table() -> _native.Table:
    table = _native.Table.create(PATH, 8, 64)
    for number in range(6):
        table.put(b"key %d" % number, b"value %d" % number, 1000.0, number)
    return table


KV_WORDS = 7168  # behind a pool's shapes and clients: what is used for what, and whose it is
KV_SLABS, KV_SHAPES = (4096, 6), ((512, 64, 1), (1024, 64, 2))


def open_pool(path: str) -> _native.KvPool:
    return _native.KvPool.open_shared(path, KV_SLABS, KV_SHAPES, 1 << 20)


def make_pool() -> _native.KvPool:
    pool = open_pool(PATH)
    pool.free(0, pool.allocate(0, 9)[4:])
    pool.allocate(1, 3)
    return pool


def use_pool(pool: _native.KvPool) -> None:
    held: list[int] = []
    for shape in (0, 1):
        attempt(lambda shape=shape: held.extend(pool.allocate(shape, 3)))
        attempt(lambda shape=shape: pool.free(shape, [0, 8, 64], True))
        attempt(lambda shape=shape: pool.take(shape, [0, 16], pool.identity))
        attempt(lambda shape=shape: pool.offer(shape, [0, 16]))
        attempt(lambda shape=shape: use_rest(pool, shape))
        attempt(lambda shape=shape: pool.free_blocks(shape))
    attempt(lambda: pool.free(0, held))
    attempt(lambda: pool.used_bytes)
    attempt(pool.reclaim)
    attempt(pool.close)


def use_rest(pool: _native.KvPool, shape: int) -> None:
    words = pool.rest(shape, [0, 16])
    pool.still_rest(shape, [0, 16], words)
    pool.allocate(shape, 2)
    pool.tell(shape, [bytes(16), b"k" * 16], [0, 16], words)
    pool.look_up(shape, [bytes(16), b"k" * 16])
    pool.wake(shape, [0, 16], words)


WEIGHT_BYTES = 5 << 20


def open_weights(path: str) -> _native.WeightCache:
    return _native.WeightCache.open_or_create(path, WEIGHT_BYTES)


def make_weights() -> _native.WeightCache:
    """Two models, of which the second is still to be loaded, and an eviction."""
    for file in Path(PATH).parent.glob(f"{Path(PATH).name}+*"):
        file.unlink()
    source = Path(f"{PATH}-source")
    source.write_bytes(bytes(8192))
    job = (planned(source), 0, 8192, 1, 8192, 1, 0, 0, 0, 0)
    weights = open_weights(PATH)
    for number in range(3):
        model = weights.acquire(bytes([number] * 32), "model", 8192, 1, 0.0)
        if number < 2:
            model.load([job], 1)
    weights.evict(bytes(32))
    weights.prepare(1)
    return weights


def use_weights(weights: _native.WeightCache) -> None:
    for number in range(4):
        model_key = bytes([number] * 32)
        attempt(lambda model_key=model_key: weights.set_demand(model_key, True))
        attempt(lambda model_key=model_key: use_model(weights, model_key))
        attempt(lambda model_key=model_key: weights.evict(model_key))
    attempt(lambda: weights.prepare(WEIGHT_BYTES))
    attempt(lambda: weights.ready_bytes)
    attempt(lambda: weights.acquire(b"n" * 32, "large", WEIGHT_BYTES, 1, 0.001))
    attempt(lambda: weights.prepare(1))
    attempt(weights.status)
    attempt(weights.evictions)
    attempt(lambda: weights.used_bytes)


def use_model(weights: _native.WeightCache, model_key: bytes) -> None:
    model = weights.acquire(model_key, "model", 8192, 1, 0.001)
    attempt(model.pin)
    attempt(model.note_use)
    attempt(lambda: model.wait_stage(1, 0.001))
    attempt(model.take_over)
    attempt(model.unpin)
    attempt(model.close)


def use_ring(ring: _native.Ring) -> None:
    attempt(lambda: ring.send(b"s" * 100))
    attempt(lambda: ring.send(b"s" * 3000, 0.001))
    for _ in range(3):
        attempt(lambda: ring.receive(0.001))
    attempt(lambda: ring.pending_bytes)
    attempt(ring.wake)


def use_table(table: _native.Table) -> None:
    for key in (b"key 1", b"key 5", b"new"):
        attempt(lambda key=key: table.get(key))
        attempt(lambda key=key: table.put(key, b"w" * 50, 1.0, 3))
        attempt(lambda key=key: table.put_evicting(key, b"w" * 64, 1.0))
        attempt(lambda key=key: table.renew(key, b"w", 1.0, 0))
        attempt(lambda key=key: table.remove(key, 3))
    attempt(table.items)


class Tally:
    errors = 0


def attempt(use: object) -> None:
    try:
        use()
    except (AegaeonError, ValueError):  # ValueError: ids that are none of the shape
        Tally.errors += 1
    except RuntimeError as error:  # an unpin without a pin
        assert "not pinned" in str(error)


def damage(rng: random.Random, content: bytearray | mmap.mmap, first: int) -> None:
    """Flip bits or write extreme words, most of them where positions and lengths stand."""
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        limit = len(content) if rng.random() < 0.4 else min(len(content), first + CONTROL_BYTES)
        at = rng.randrange(first, limit)
        if rng.random() < 0.5:
            content[at] ^= 1 << rng.randrange(8)
        else:
            at = min(at & ~7, len(content) - 8)
            word = rng.choice((0, 1, 2**64 - 1, 2**63, rng.getrandbits(64), rng.getrandbits(16)))
            content[at : at + 8] = word.to_bytes(8, "little")


def fuzz_attach(rng: random.Random, valid: bytes, first: int, open_it: object, use: object) -> None:
    content = bytearray(valid)
    damage(rng, content, rng.choice((0, 0, first)))
    match rng.randrange(6):
        case 0:
            del content[rng.randrange(len(content)) :]
        case 1:
            content += bytes(rng.randrange(1, 9000))
    Path(PATH).write_bytes(content)
    attempt(lambda: use(open_it(PATH)))
    Path(PATH).unlink()


def fuzz_live(rng: random.Random, first: int, make: object, use: object) -> None:
    region = make()
    with Path(PATH).open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        damage(rng, memory, rng.choice((HEADER_BYTES, first)))
        use(region)
        damage(rng, memory, first)
        use(region)
    Path(PATH).unlink()


def main() -> int:
    rounds = int(sys.argv[1])
    kinds = (
        (HEADER_BYTES, make_ring, _native.Ring.attach, use_ring),
        (HEADER_BYTES, make_table, _native.Table.attach, use_table),
        (HEADER_BYTES, make_weights, open_weights, use_weights),
        (HEADER_BYTES + KV_WORDS, make_pool, open_pool, use_pool),
    )
    for first, make, open_it, use in kinds:
        make()
        valid = Path(PATH).read_bytes()
        Path(PATH).unlink()
        for seed in range(rounds):
            rng = random.Random(seed)
            if seed % 2:
                fuzz_attach(rng, valid, first, open_it, use)
            else:
                fuzz_live(rng, first, make, use)
    for file in Path(PATH).parent.glob(f"{Path(PATH).name}*"):
        file.unlink()
    sys.stdout.write(f"{Tally.errors} errors\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
