"""The gateway where a request is handed from instance to instance."""

import asyncio
import time

from aegaeon.types import Moved, RequestFailed
from tests.proxy.test_gateway import TOKENS, Setup, collect, generation, run, until
from tests.support.deltas import deltas_of


def split(setup, hold_after=3):
    """One instance that prefills and one that decodes; both stop after so many tokens."""
    first = setup.instance(id="p", role="prefill")
    second = setup.instance(id="d", role="decode")
    first.hold_after = second.hold_after = hold_after
    return first, second


async def held(instance):
    await until(lambda: instance.submitted)
    return instance.submitted[-1]


async def moved_to(setup, request, instance):
    opened = setup.gateway._open[request.id]
    # Seen from another thread: it may be nowhere for a moment.
    await until(lambda: (target := opened.target) is not None and target.instance == instance)


def test_a_moved_request_streams_on_from_its_new_home():
    async def test():
        async with Setup() as setup:
            first, second = split(setup)
            task = asyncio.create_task(collect(setup.gateway, generation()))
            first.move(await held(first), second)
            second.release()
            tokens, last = await task
            assert (tokens, last.instance) == (TOKENS, "d")
            assert first.cancelled == second.cancelled == [] and len(first.submitted) == 1
            assert not setup.gateway._outbox._sent
            assignment = setup.domain.metadata().get_assignment
            await until(lambda: assignment(first.submitted[0].id) == "d")

    run(test())


def test_leaving_a_moved_request_cancels_it_where_it_is():
    async def test():
        async with Setup() as setup:
            first, second = split(setup)
            async with deltas_of(setup.gateway, generation()) as deltas:
                async for _ in deltas:
                    break
                request = await held(first)
                first.move(request, second)
                await moved_to(setup, request, "d")
            await until(lambda: second.cancelled)
            assert second.cancelled == [request.id] and not setup.gateway._outbox._sent

    run(test())


def test_a_new_home_that_is_lost_has_its_requests_prefilled_again():
    async def test():
        async with Setup() as setup:
            first, second = split(setup)
            task = asyncio.create_task(collect(setup.gateway, generation()))
            request = await held(first)
            first.move(request, second)
            await moved_to(setup, request, "d")
            await asyncio.to_thread(second.die)
            first.release()
            assert (await task)[0] == TOKENS
            again = first.submitted[-1]
            assert (again.attempt, again.generated_token_ids) == (1, TOKENS[:3])

    run(test())


def test_whoever_takes_a_request_that_nobody_waits_for_is_told():
    async def test():
        async with Setup() as setup:
            first, second = split(setup)
            task = asyncio.create_task(collect(setup.gateway, generation()))
            request = await held(first)
            second.say(request, Moved("unknown", 0, second.id, second.incarnation))
            await until(lambda: second.cancelled == ["unknown"])
            second.say(request, Moved(request.id, 7, second.id, second.incarnation))
            await until(lambda: second.cancelled == ["unknown", request.id])
            first.release()
            assert (await task)[0] == TOKENS

    run(test())


def test_a_former_home_has_no_say():
    async def test():
        async with Setup() as setup:
            first, second = split(setup)
            task = asyncio.create_task(collect(setup.gateway, generation()))
            request = await held(first)
            first.move(request, second)
            await moved_to(setup, request, "d")
            for code in ("handoff_lost", "draining", "internal_error"):
                first.say(request, RequestFailed(request.id, 0, code, "late", first.id))
            second.release()
            assert (await task)[0] == TOKENS
            assert len(first.submitted) == 1

    run(test())


def test_a_hand_off_that_was_lost_is_tried_again_at_the_same_instance():
    async def test():
        async with Setup() as setup:
            first, _ = split(setup)
            task = asyncio.create_task(collect(setup.gateway, generation()))
            request = await held(first)
            first.release()
            first.say(request, RequestFailed(request.id, 0, "handoff_lost", "silence", first.id))
            assert (await task)[0] == TOKENS

    run(test())


def test_only_instances_that_prefill_get_new_requests():
    async def test():
        async with Setup() as setup:
            first, second = split(setup, 0)
            tasks = [asyncio.create_task(collect(setup.gateway, generation())) for _ in range(8)]
            await until(lambda: len(first.submitted) == 8)
            assert not second.submitted
            first.release()
            await asyncio.gather(*tasks)

    run(test())


def test_it_is_ready_when_somebody_prefills_and_somebody_decodes():
    async def test():
        async with Setup() as setup:
            setup.instance(id="p", role="prefill")
            await until(setup.gateway.instances)
            assert not setup.gateway.is_ready()
            setup.instance(id="d", role="decode")
            await until(setup.gateway.is_ready)

    run(test())


def test_an_answer_that_is_over_before_we_know_where_it_went_is_counted_nowhere():
    async def test():
        async with Setup() as setup:
            setup.instance()
            outbox, submit = setup.gateway._outbox, setup.gateway._outbox.submit

            def slow_submit(*arguments):
                target = submit(*arguments)
                time.sleep(0.2)
                return target

            outbox.submit = slow_submit
            tokens, _ = await collect(setup.gateway, generation())
            assert tokens == TOKENS
            await until(lambda: not outbox._sent)

    run(test())
