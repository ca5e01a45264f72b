"""A cancellation is never lost, in whatever moment of a wait it comes."""

import asyncio

import pytest

from aegaeon.errors import InstanceLost
from aegaeon.proxy.choices import Choices
from aegaeon.proxy.generation import Delta, Generation, OpenRequest
from aegaeon.proxy.transcript import Transcript
from aegaeon.proxy.waits import within
from aegaeon.sampling import SamplingParams

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
    """A gateway whose only stream gives one token when `changed` is set, then waits."""

    def __init__(self):
        self.changed = asyncio.Event()

    async def stream(self, _):
        await self.changed.wait()
        yield Delta((65,), None, "instance-0", 0.0)
        await asyncio.Event().wait()


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
            return await cancelled_in_tick(ticks, pieces.next(9.0), source.changed.set)

    for case in (event, request, choices):
        assert asyncio.run(case()), case.__name__


def test_a_wait_ends_in_time():
    async def test():
        with pytest.raises(asyncio.TimeoutError):
            await within(0.01, asyncio.Event().wait())
        async with Choices(Source(), [GENERATION], [transcript()]) as pieces:
            assert await pieces.next(0.01) is None
            assert pieces.ready() is None

    asyncio.run(asyncio.wait_for(test(), 20))
