"""The gateway where an instance reads nothing or only starts, or the table does not answer."""

import asyncio
import threading
from contextlib import AsyncExitStack

import pytest

from aegaeon.errors import DeadlineExceeded, ModelLoading, Overloaded
from aegaeon.store.local import RECORD_OVERHEAD_BYTES
from aegaeon.types import TokenEvent
from tests.proxy.test_gateway import TOKENS, Setup, collect, generation, run, until
from tests.support.deltas import deltas_of
from tests.support.fake_instance import wait_until

FULL_BYTES = 1 << 10


def make_hung(setup, **options):
    """An instance whose mailbox is full."""
    instance = setup.instance(capacity_bytes=FULL_BYTES, is_hung=True, **options)
    fill(setup, instance)
    return instance


def fill(setup, instance):
    mailbox = setup.domain.open_mailbox(f"{instance.id}-{instance.incarnation}")
    mailbox.send(b"x" * (FULL_BYTES - RECORD_OVERHEAD_BYTES))


async def seen(setup, count):
    await until(lambda: len(setup.gateway.instances()) == count)


def test_a_request_passes_over_an_instance_whose_mailbox_is_full():
    async def test():
        async with Setup() as setup:
            make_hung(setup, id="a")
            other = setup.instance(id="b")
            other.publish("ready", waiting={"m": 9})  # the hung one looks better
            await seen(setup, 2)
            tokens, last = await collect(setup.gateway, generation())
            assert (tokens, last.instance) == (TOKENS, "b")

    run(test())


def test_it_is_overload_only_when_all_mailboxes_are_full():
    async def test():
        async with Setup() as setup:
            for name in "ab":
                make_hung(setup, id=name)
            await seen(setup, 2)
            with pytest.raises(Overloaded, match="a, b take no messages"):
                await collect(setup.gateway, generation())
            assert setup.gateway.open_requests == 0

    run(test())


async def leave_at_a_hung_instance(setup, count=20):
    """Begin and leave `count` requests at an instance that reads nothing any more."""
    hung = setup.instance(id="a", capacity_bytes=FULL_BYTES)
    hung.hold_after = 1
    async with AsyncExitStack() as stack:
        for _ in range(count):
            await anext(await stack.enter_async_context(deltas_of(setup.gateway, generation())))
        await asyncio.to_thread(hung.hang)
        fill(setup, hung)
    return hung


def test_cancels_reach_a_hung_instance_later_and_hold_nobody_up():
    async def test():
        async with Setup() as setup:
            hung = await leave_at_a_hung_instance(setup)
            setup.instance(id="b")
            hung.publish("ready", waiting={"m": 99})
            await seen(setup, 2)
            tokens, last = await collect(setup.gateway, generation())
            assert (tokens, last.instance) == (TOKENS, "b")
            assert hung.cancelled == []
            hung._mailbox.receive(0.0)
            hung.recover()
            await until(lambda: len(hung.cancelled) == 20)
            assert sorted(hung.cancelled) == sorted(request.id for request in hung.submitted)

    run(test())


def test_cancels_of_an_instance_are_dropped_with_it():
    async def test():
        async with Setup() as setup:
            hung = await leave_at_a_hung_instance(setup)
            outbox = setup.gateway._outbox
            await until(lambda: any(way.cancels for way in outbox._ways.values()))
            hung.die()
            await until(lambda: not outbox._ways)

    run(test())


def test_deadlines_are_kept_while_the_table_does_not_answer():
    async def test():
        async with Setup(request_timeout_s=0.5) as setup:
            instance = setup.instance()
            instance.hold_after = 1
            store, answers = setup.gateway._outbox._store, threading.Event()
            read = store.sync_for_routing
            try:
                async with deltas_of(setup.gateway, generation()) as deltas:
                    await anext(deltas)
                    store.sync_for_routing = lambda: (answers.wait(), read())[1]
                    with pytest.raises(DeadlineExceeded):
                        await anext(deltas)
            finally:
                answers.set()

    run(test())


def test_an_attempt_that_is_over_before_it_is_placed_is_cancelled():
    async def test():
        async with Setup() as setup:
            instance = setup.instance()
            instance.hold_after = 0
            outbox = setup.gateway._outbox
            submit, gaps = outbox.submit, []

            def lose_a_token(request, refused):
                target = submit(request, refused)
                if target is not None and not gaps:
                    gaps.append(request)
                    instance.say(request, TokenEvent(request.id, 0, 5, (1,), instance.id))
                    opened = setup.gateway._open[request.id]
                    wait_until(lambda: opened.attempt == 1)
                return target

            outbox.submit = lose_a_token
            task = asyncio.create_task(collect(setup.gateway, generation()))
            await until(lambda: instance.cancelled)
            await until(lambda: len(instance.submitted) == 2)
            instance.release()
            assert (await task)[0] == TOKENS
            assert instance.cancelled == [gaps[0].id]

    run(test())


def test_while_instances_start_the_model_is_loading():
    async def test():
        async with Setup(patience_s=0.2) as setup:
            setup.instance(state="starting")
            with pytest.raises(ModelLoading, match=r"'m' yet.*try again"):
                await collect(setup.gateway, generation())

    run(test())
