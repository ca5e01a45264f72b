"""What large input took of memory goes back to the system once it is done with."""

import asyncio
import subprocess
import sys

import pytest

from aegaeon.proxy import residue

# In a process of its own: nobody else's memory comes and goes there. Between pieces that go, some
# stay, as they do of a tokenizer's: the heap of the thread ends nowhere. What there was is read
# while it is in use: a look between the two may give some of it back.
PROGRAM = """
import asyncio
from aegaeon.proxy.residue import resident_bytes, without_residue

def work():
    pieces = [bytes(3000) for _ in range(100_000)]
    return pieces[::1000], resident_bytes()

async def main():
    async with without_residue(look_s=0.05):
        before = resident_bytes()
        kept = [await asyncio.to_thread(work) for _ in range(2)]
        grown = max(resident for _, resident in kept)
        for _ in range(200):
            await asyncio.sleep(0.05)
            if resident_bytes() < before + (100 << 20):
                break
        print(grown - before, resident_bytes() - before)

asyncio.run(main())
"""


@pytest.mark.skipif(residue._trim() is None, reason="the allocator gives nothing back when asked")
def test_memory_that_is_free_is_given_back():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True
    )
    grown, left = map(int, done.stdout.split())
    assert grown > 200 << 20
    assert left < 100 << 20


def test_an_allocator_that_gives_nothing_back_is_left_alone(monkeypatch):
    monkeypatch.setattr(residue, "_trim", lambda: None)

    async def test():
        async with residue.without_residue():
            return len(asyncio.all_tasks())

    assert asyncio.run(test()) == 1


def test_it_is_done_where_there_is_much_and_now_and_then_where_there_was(monkeypatch):
    growth = residue.GROWTH_BYTES
    calls, sizes = [], iter(
        [100 + growth, 90]  # little more than at first
        + [91 + growth, 80 + growth]  # much more, and much is in use: a look, then what is left
        + [80 + growth] * (residue.AGAIN_LOOKS - 1)  # no more than then
        + [91 + growth, 20]  # much more than there ever was, for long: given back
        + [20] * residue.AGAIN_LOOKS
    )  # fmt: skip

    def size():
        now = next(sizes, None)
        if now is None:
            raise EOFError
        calls.append(now)
        return now

    monkeypatch.setattr(residue, "resident_bytes", size)
    trimmed = []

    def trim(_):
        trimmed.append(len(calls))

    with pytest.raises(EOFError):
        asyncio.run(residue._watch(trim, 0.0001, least=100))
    assert trimmed == [3, 3 + 1 + residue.AGAIN_LOOKS]
