"""A cancellation is never lost, in whatever moment of a wait it comes."""

import asyncio
import contextlib
import gc
import weakref

import pytest

from aegaeon.errors import InstanceLost
from aegaeon.proxy.choices import Choices
from aegaeon.proxy.generation import Generation, OpenRequest
from aegaeon.proxy.transcript import Transcript
from aegaeon.proxy.waits import Alarm, within
from aegaeon.sampling import SamplingParams
from aegaeon.types import TokenEvent

GENERATION = Generation(
    model="m", prompt_token_ids=(1,), sampling=SamplingParams(), max_tokens=9, stop_token_ids=()
)


class Plain:
    """A detokenizer for ids that are code points."""

    def push(self, token_id):
        return chr(token_id)

    def finish(self):
        return ""


def transcript():
    return Transcript((Plain(), Plain()), ())


class Source:
    """A gateway with one request, which never ends."""

    def open_all(self, generations):
        (generation,) = generations
        self.opened = OpenRequest("r", generation, 0.0, 1e9)
        return [self.opened]

    def leave(self, _):
        pass

    async def keep(self, _):
        await asyncio.Event().wait()

    def send(self):
        """Let one token come."""
        event = TokenEvent("r", 0, 0, (65,), "instance-0")
        assert self.opened.take_in(event, 0.0) is False


async def cancelled_in_tick(ticks, waiting, happen):
    """Let it happen, cancel the wait so many rounds of the loop later; say whether it noticed."""
    task = asyncio.ensure_future(waiting)
    await asyncio.sleep(0.01)
    happen()
    for _ in range(ticks):
        await asyncio.sleep(0)
    if task.done():
        return True
    task.cancel()
    await asyncio.wait({task}, timeout=5)
    return task.cancelled()


@pytest.mark.parametrize("ticks", range(8))
def test_no_wait_swallows_a_cancellation(ticks):
    async def event():
        changed = asyncio.Event()
        return await cancelled_in_tick(ticks, within(9, changed.wait()), changed.set)

    async def request():
        opened = OpenRequest("r", GENERATION, 0.0, 1e9)
        return await cancelled_in_tick(
            ticks, opened.wait(), lambda: opened.fail(InstanceLost("gone"))
        )

    async def choices():
        source = Source()
        async with Choices(source, [GENERATION], [transcript()]) as pieces:
            return await cancelled_in_tick(ticks, pieces.next(9.0), source.send)

    async def alarm():
        rings = Alarm()
        due_s = asyncio.get_running_loop().time() + 9
        try:
            return await cancelled_in_tick(ticks, rings.wait(due_s), rings.wake)
        finally:
            rings.close()

    for case in (event, request, choices, alarm):
        assert asyncio.run(case()), case.__name__


def test_a_wait_ends_in_time():
    async def test():
        with pytest.raises(asyncio.TimeoutError):
            await within(0.01, asyncio.Event().wait())
        async with Choices(Source(), [GENERATION], [transcript()]) as pieces:
            assert await pieces.next(0.01) is None
            assert pieces.ready() is None

    asyncio.run(asyncio.wait_for(test(), 20))


def test_an_alarm_rings_at_its_last_time_and_not_at_one_before():
    async def test():
        alarm, loop = Alarm(), asyncio.get_running_loop()
        began_s = loop.time()
        loop.call_later(0.01, alarm.wake)
        assert await alarm.wait(began_s + 0.05) is True
        assert await alarm.wait(began_s + 0.1) is False
        assert loop.time() >= began_s + 0.1
        loop.call_later(0.01, alarm.wake)
        assert await alarm.wait(began_s + 60) is True
        assert await alarm.wait(loop.time() + 0.01) is False
        alarm.close()

    asyncio.run(asyncio.wait_for(test(), 20))


@pytest.mark.parametrize("timeout_s", [10.0, 0.01])
def test_nothing_of_what_failed_is_kept(timeout_s):
    class Body:
        pass

    held = []

    async def work():
        body = Body()
        held.append(weakref.ref(body))
        await asyncio.sleep(0.03 if timeout_s < 1 else 0)
        raise ValueError(id(body))

    async def test():
        with contextlib.suppress(ValueError, asyncio.TimeoutError):
            await within(timeout_s, work())
        await asyncio.sleep(0.01)
        return held[0]()

    gc.disable()
    try:
        assert asyncio.run(test()) is None
    finally:
        gc.enable()
