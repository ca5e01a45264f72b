"""The receiver takes each reply to the loop once, in order: in slices, or all when far behind."""

import asyncio
import itertools
import time

from aegaeon.proxy.receiver import Receiver
from aegaeon.store.codec import decode_replies, encode, joined
from aegaeon.store.local import LocalDomain
from aegaeon.types import TokenEvent


def event(position):
    return TokenEvent("r", 0, position, (position,), "i")


async def received(send, count):
    """Return the positions that reach the loop, and how many came by each of its turns."""
    domain, loop = LocalDomain(), asyncio.get_running_loop()
    mailbox = domain.create_mailbox("proxy")
    taken, done = [], asyncio.Event()
    turns = []

    def take(reply, received_s):
        assert received_s > 0
        taken.append(reply.position)
        if len(taken) == count:
            done.set()

    async def count_turns():
        while not done.is_set():
            turns.append(len(taken))
            await asyncio.sleep(0)

    receiver = Receiver(mailbox, loop, take, done.set)
    send(domain.open_mailbox("proxy"))
    receiver.start()
    try:
        await asyncio.wait_for(asyncio.gather(done.wait(), count_turns()), 20)
    finally:
        await receiver.stop()
    steps = [b - a for a, b in itertools.pairwise([0, *turns, len(taken)])]
    return taken, max(steps)


def test_joined_and_single_replies_come_in_order():
    def send(mailbox):
        mailbox.send(joined([encode(event(n)) for n in range(100)]))
        mailbox.send(b"no reply")
        for n in range(100, 110):
            mailbox.send(encode(event(n)))

    taken, most = asyncio.run(received(send, 110))
    assert taken == list(range(110))
    assert most <= 64  # a slice, and perhaps one that was due beside it


def test_who_is_far_behind_takes_all_in():
    taken, most = asyncio.run(
        received(lambda box: box.send(joined([encode(event(n)) for n in range(3000)])), 3000)
    )
    assert taken == list(range(3000))
    assert most > 1024


def test_what_comes_close_behind_a_long_turn_is_gathered():
    turns = []

    def first(records):
        turns.append([position for record, _ in records for position in positions(record)])
        time.sleep(0.02)
        return []

    async def run():
        domain, loop = LocalDomain(), asyncio.get_running_loop()
        receiver = Receiver(domain.create_mailbox("p"), loop, lambda *_: None, None, first)
        mailbox = domain.open_mailbox("p")
        receiver.start()
        try:
            for n in range(40):
                mailbox.send(encode(event(n)))
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.1)
        finally:
            await receiver.stop()

    asyncio.run(run())
    assert [position for turn in turns for position in turn] == list(range(40))
    assert len(turns) < 25


def positions(record):
    return [reply.position for reply in decode_replies(record)]


def test_nothing_is_taken_after_the_end():
    async def run():
        domain, taken = LocalDomain(), []
        mailbox = domain.create_mailbox("proxy")
        loop = asyncio.get_running_loop()
        receiver = Receiver(mailbox, loop, lambda reply, _: taken.append(reply), lambda: None)
        receiver.start()
        await receiver.stop()
        domain.open_mailbox("proxy").send(encode(event(0)))
        await asyncio.sleep(0.05)
        return taken

    assert asyncio.run(run()) == []
