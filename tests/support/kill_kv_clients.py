"""Kills clients of a KV pool at random moments; the others' blocks stay whole, and all come back.

Run as a program: `kill_kv_clients.py KILLS`. Clients allocate, free, lay to rest and wake, hand
blocks to each other and write into each block the identity of its holder and a number, which nobody
else may overwrite. No torch here: clients start thousands of times.
"""

import mmap
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from aegaeon import _native
from aegaeon.errors import OutOfBlocks

PATH = f"/dev/shm/aegaeon-kill-kv-{os.getpid()}.kv"
CLIENTS = 4
SLABS = (8192, 24)
# (block bytes, page bytes, encoding): three shapes, two encodings.
SHAPES = ((512, 64, 1), (1536, 64, 1), (1024, 128, 2))
QUOTA = 3 * SLABS[0] * SLABS[1] // 4
MAIL_SLOTS = 64
MAIL_BYTES = 512
MOST_BLOCKS = 6

KEYS = 64

Held = dict[tuple[int, int], int]  # (shape, block) -> the number written into it


def open_pool() -> _native.KvPool:
    return _native.KvPool.open_shared(PATH, SLABS, SHAPES, QUOTA)


def key_of(number: int) -> bytes:
    return random.Random(number % KEYS).randbytes(16)


class Client:
    """Works at random; a block of its own that changes under it is a failure."""

    def __init__(self, seed: int, mail: mmap.mmap) -> None:
        self.pool = open_pool()
        self.bytes = memoryview(self.pool)
        self.rng = random.Random(seed)
        self.mail = mail
        self.held: Held = {}
        self.offered: list[tuple[int, list[int], int]] = []
        self.resting: list[tuple[int, int, int, int]] = []  # shape, block, word, number

    def place(self, shape: int, block: int) -> slice:
        start = block * SHAPES[shape][1]
        return slice(start, start + SHAPES[shape][0])

    def stamp(self, shape: int, block: int) -> None:
        number = self.rng.getrandbits(63) | 1
        self.bytes[self.place(shape, block)] = number.to_bytes(8, "little") * (
            SHAPES[shape][0] // 8
        )
        self.held[shape, block] = number

    def check(self, shape: int, block: int) -> None:
        content = bytes(self.bytes[self.place(shape, block)])
        number = self.held[shape, block].to_bytes(8, "little")
        assert content == number * (len(content) // 8), "somebody wrote into a block of ours"

    def step(self) -> None:
        verbs = (self.allocate, self.allocate, self.free, self.free, self.hand_out, self.receive)
        self.rng.choice((*verbs, self.rest, self.wake, self.find))()
        if self.held and self.rng.random() < 0.2:
            self.check(*self.rng.choice(list(self.held)))

    def allocate(self) -> None:
        shape = self.rng.randrange(len(SHAPES))
        try:
            blocks = self.pool.allocate(shape, self.rng.randrange(1, MOST_BLOCKS))
        except OutOfBlocks:
            self.drop(self.rng.sample(list(self.held), len(self.held) // 2))
            return
        for block in blocks:
            assert (shape, block) not in self.held, "a block was given twice"
            self.stamp(shape, block)

    def free(self) -> None:
        count = min(len(self.held), self.rng.randrange(1, MOST_BLOCKS))
        self.drop(self.rng.sample(list(self.held), count))

    def drop(self, blocks: list[tuple[int, int]]) -> None:
        for shape, block in blocks:
            self.check(shape, block)
            del self.held[shape, block]
            self.pool.free(shape, [block], self.rng.random() < 0.1)

    def rest(self) -> None:
        if self.held:
            shape, block = self.rng.choice(list(self.held))
            (word,) = self.pool.rest(shape, [block])
            number = self.held.pop((shape, block))
            # By few keys, so that clients find each other's.
            self.pool.tell(shape, [key_of(number)], [block], [word])
            self.resting.append((shape, block, word, number))

    def wake(self) -> None:
        """What is woken is as it was; the rest has made room for somebody."""
        if not self.resting:
            return
        shape, block, word, number = self.resting.pop(self.rng.randrange(len(self.resting)))
        if self.pool.wake(shape, [block], [word]):
            assert (shape, block) not in self.held, "woke what is ours"
            self.held[shape, block] = number
            self.check(shape, block)

    def find(self) -> None:
        """What any client has told of holds a number of that key."""
        shape, key = self.rng.randrange(len(SHAPES)), key_of(self.rng.randrange(KEYS))
        ((block, word),) = self.pool.look_up(shape, [key])
        if word and self.pool.wake(shape, [block], [word]):
            assert (shape, block) not in self.held, "found what is ours"
            number = int.from_bytes(bytes(self.bytes[self.place(shape, block)])[:8], "little")
            assert key_of(number) == key, "found something else"
            self.held[shape, block] = number
            self.check(shape, block)

    def hand_out(self) -> None:
        """Offer blocks; a little later let them go, whatever has become of them."""
        if self.offered:
            shape, blocks, offer = self.offered.pop()
            self.pool.free(shape, blocks, False, offer)
            return
        shape = self.rng.randrange(len(SHAPES))
        blocks = [block for s, block in self.held if s == shape][:MOST_BLOCKS]
        offer = self.pool.offer(shape, blocks) if blocks else None
        if offer is None:
            return
        numbers = [self.held.pop((shape, block)) for block in blocks]
        words = [offer, shape, len(blocks), *blocks, *numbers]
        slot = self.rng.randrange(MAIL_SLOTS) * MAIL_BYTES
        self.mail[slot : slot + 8 * len(words)] = b"".join(w.to_bytes(8, "little") for w in words)
        self.offered.append((shape, blocks, offer))

    def receive(self) -> None:
        """Take what some letter offers. Letters may be old, torn, or of the dead."""
        slot = self.rng.randrange(MAIL_SLOTS) * MAIL_BYTES
        words = memoryview(self.mail[slot : slot + MAIL_BYTES]).cast("Q")
        offer, shape, count = words[:3]
        if not 0 < count <= MOST_BLOCKS or shape >= len(SHAPES):
            return
        blocks, numbers = list(words[3 : 3 + count]), list(words[3 + count : 3 + 2 * count])
        try:
            is_ours = self.pool.take(shape, blocks, offer)
        except (OutOfBlocks, ValueError):
            return
        if is_ours:
            for block, number in zip(blocks, numbers, strict=True):
                assert (shape, block) not in self.held, "took what is ours"
                content = bytes(self.bytes[self.place(shape, block)])
                if content[:8] == number.to_bytes(8, "little"):
                    self.held[shape, block] = number
                    self.check(shape, block)
                self.stamp(shape, block)


def start(seed: int, mail: mmap.mmap) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            _native.die_with_parent(signal.SIGKILL, parent)
            client = Client(seed, mail)
            while True:
                client.step()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return pid


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == -signal.SIGKILL, f"a client ended by itself: {status}"


def main() -> int:
    kills = int(sys.argv[1])
    rng = random.Random(kills)
    mail = mmap.mmap(-1, MAIL_SLOTS * MAIL_BYTES)
    survivor = open_pool()
    living = [start(seed, mail) for seed in range(CLIENTS)]
    reclaimed = 0
    try:
        for number in range(kills):
            time.sleep(rng.random() * 0.03)
            end(living.pop(rng.randrange(CLIENTS)))
            if number % 3 == 0:
                reclaimed += survivor.reclaim()
            living.append(start(CLIENTS + number, mail))
        while living:
            end(living.pop())
        reclaimed += survivor.reclaim()
        most = [SLABS[1] * (SLABS[0] // shape[0]) for shape in SHAPES]
        free = [min(survivor.free_blocks(n), most[n]) for n in range(len(SHAPES))]
        limits = [min(count, QUOTA // shape[0]) for count, shape in zip(most, SHAPES, strict=True)]
        assert free == limits, f"blocks are lost: {free} of {limits}"
        assert survivor.used_bytes == 0
        for shape, count in enumerate(limits):
            survivor.free(shape, survivor.allocate(shape, count))
    finally:
        for pid in living:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for name in (PATH, f"{PATH}+arena"):
            Path(name).unlink(missing_ok=True)
    sys.stdout.write(f"{kills} killed, {reclaimed} blocks reclaimed\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
