"""The gateway alone, over the local store and scripted instances."""

import asyncio
from contextlib import asynccontextmanager
from functools import partial

import pytest

from aegaeon.config import check_settings
from aegaeon.deaths import PROGRESS_TOKENS
from aegaeon.errors import (
    CheckpointError,
    DeadlineExceeded,
    InstanceLost,
    ModelNotFound,
    QueueFull,
    StoreUnavailable,
)
from aegaeon.proxy.gateway import Gateway
from aegaeon.proxy.generation import Generation
from aegaeon.proxy.losses import MAX_LOSSES
from aegaeon.store.local import LocalDomain
from aegaeon.types import ModelSpec, SamplingParams
from tests.support.deltas import deltas_of
from tests.support.fake_instance import FakeInstance, wait_until

SPECS = (
    ModelSpec(
        id="m",
        path="nowhere",
        architecture="LlamaForCausalLM",
        weight_bytes=1,
        kv_token_bytes=1,
        context_tokens=1000,
        vocab_tokens=1000,
    ),
)
TOKENS = tuple(range(100, 140))


def generation(**changes):
    fields = {
        "model": "m",
        "prompt_token_ids": (1, 2, 3),
        "sampling": SamplingParams(),
        "max_tokens": 40,
    }
    return Generation(**{**fields, **changes})


def reply(request):
    return TOKENS


ADDRESS = "proxy"


class Setup:
    """A domain with a gateway; instances are made by the tests and ended here."""

    def __init__(self, **settings):
        self.patience_s = settings.pop("patience_s", 20.0)
        self.settings = check_settings({"colocated_count": 1, **settings})
        self.domain = LocalDomain()
        self.instances = []

    def instance(self, answer=reply, **options):
        self.instances.append(FakeInstance(self.domain, answer, **options))
        return self.instances[-1]

    async def __aenter__(self):
        self.gateway = Gateway(self.domain, self.settings, SPECS, ADDRESS, self.patience_s)
        await self.gateway.start()
        return self

    async def __aexit__(self, *failure):
        await self.gateway.close()
        for instance in self.instances:
            instance.die()


async def collect(gateway, asked):
    async with deltas_of(gateway, asked) as deltas:
        parts = [delta async for delta in deltas]
    return tuple(t for part in parts for t in part.token_ids), parts[-1]


async def until(claim):
    await asyncio.to_thread(wait_until, claim)


def run(test):
    asyncio.run(asyncio.wait_for(test, 60))


def test_tokens_arrive_in_order_with_a_finish_reason():
    async def test():
        async with Setup() as setup:
            setup.instance()
            tokens, last = await collect(setup.gateway, generation())
            assert (tokens, last.finish_reason, last.instance) == (TOKENS, "length", "instance-0")
            assert setup.gateway.open_requests == 0

    run(test())


def test_a_stop_token_ends_the_stream():
    async def test():
        async with Setup() as setup:
            setup.instance()
            tokens, last = await collect(setup.gateway, generation(stop_token_ids=(105,)))
            assert tokens == TOKENS[:6]
            assert last.finish_reason == "stop"

    run(test())


def test_a_lost_instance_is_replaced_without_a_token_missing_or_twice():
    async def test():
        async with Setup() as setup:
            first = setup.instance(id="a")
            first.hold_after = 10
            got = []
            async with deltas_of(setup.gateway, generation()) as deltas:
                async for delta in deltas:
                    got.extend(delta.token_ids)
                    if len(got) == 10:
                        second = setup.instance(id="b")
                        await asyncio.to_thread(first.die)
            assert tuple(got) == TOKENS
            again = second.submitted[0]
            assert again.generated_token_ids == TOKENS[:10]
            assert again.attempt == 1

    run(test())


def test_a_restarted_instance_takes_its_requests_up_again():
    async def test():
        async with Setup() as setup:
            first = setup.instance(id="a")
            first.hold_after = 3
            task = asyncio.create_task(collect(setup.gateway, generation()))
            await until(lambda: first.submitted)
            # Its lease still runs; the higher incarnation says that it is gone.
            second = setup.instance(id="a", incarnation=2)
            tokens, last = await task
            assert tokens == TOKENS
            assert last.instance == "a"
            assert second.submitted[0].attempt == 1

    run(test())


def test_a_draining_instance_hands_its_requests_on():
    async def test():
        async with Setup() as setup:
            draining = setup.instance(id="a")
            draining.fail_with = ("draining", "about to stop")
            task = asyncio.create_task(collect(setup.gateway, generation()))
            await until(lambda: draining.submitted)
            setup.instance(id="b")
            tokens, last = await task
            assert (tokens, last.instance) == (TOKENS, "b")
            assert len(draining.submitted) == 1

    run(test())


def test_a_request_that_ends_instances_is_given_up():
    async def test():
        async with Setup() as setup:
            task = asyncio.create_task(collect(setup.gateway, generation()))
            for life in range(1, MAX_LOSSES + 1):
                instance = setup.instance(id="a", incarnation=life)
                instance.hold_after = 0
                await until(lambda life=instance: life.submitted)
                await asyncio.to_thread(instance.die)
            with pytest.raises(InstanceLost, match=f"{MAX_LOSSES} instances ended"):
                await task

    run(test())


def test_one_that_makes_progress_between_them_goes_on():
    async def test():
        async with Setup() as setup:
            tokens = []

            async def read():
                async with deltas_of(setup.gateway, generation()) as deltas:
                    async for delta in deltas:
                        tokens.extend(delta.token_ids)

            task = asyncio.create_task(read())
            for life in range(1, len(TOKENS) // PROGRESS_TOKENS):
                instance = setup.instance(id="a", incarnation=life)
                instance.hold_after = PROGRESS_TOKENS * life
                await until(lambda life=life: len(tokens) == PROGRESS_TOKENS * life)
                await asyncio.to_thread(instance.die)
            setup.instance(id="b")
            await task
            assert tuple(tokens) == TOKENS

    run(test())


def test_closing_the_stream_cancels_at_the_instance():
    async def test():
        async with Setup() as setup:
            instance = setup.instance()
            instance.hold_after = 5
            async with deltas_of(setup.gateway, generation()) as deltas:
                async for _ in deltas:
                    break
            await until(lambda: instance.cancelled)
            assert instance.cancelled == [instance.submitted[0].id]
            assert setup.gateway.open_requests == 0

    run(test())


def test_a_request_waits_for_an_instance_to_become_ready():
    async def test():
        async with Setup() as setup:
            instance = setup.instance(state="starting")
            task = asyncio.create_task(collect(setup.gateway, generation()))
            await asyncio.sleep(0)
            assert not instance.submitted
            instance.publish("ready")
            tokens, _ = await task
            assert tokens == TOKENS

    run(test())


def test_without_any_instance_the_wait_is_bounded():
    async def test():
        async with Setup(patience_s=0.1) as setup:
            with pytest.raises(InstanceLost, match="no instance is ready"):
                await collect(setup.gateway, generation())

    run(test())


def test_a_request_ends_at_its_deadline_and_is_cancelled():
    async def test():
        async with Setup(request_timeout_s=0.3) as setup:
            instance = setup.instance()
            instance.hold_after = 2
            with pytest.raises(DeadlineExceeded):
                await collect(setup.gateway, generation())
            await until(lambda: instance.cancelled)

    run(test())


def test_an_instances_error_arrives_as_its_class():
    async def test():
        async with Setup() as setup:
            instance = setup.instance()
            instance.fail_with = ("checkpoint_error", "model.safetensors is truncated")
            with pytest.raises(CheckpointError, match="truncated"):
                await collect(setup.gateway, generation())

    run(test())


def test_open_requests_are_bounded():
    async def test():
        async with Setup(max_waiting=1) as setup:
            instance = setup.instance()
            instance.hold_after = 0
            first = asyncio.create_task(collect(setup.gateway, generation()))
            await until(lambda: instance.submitted)
            with pytest.raises(QueueFull):
                await collect(setup.gateway, generation())
            instance.release()
            await first

    run(test())


def test_a_model_nobody_serves_is_refused():
    async def test():
        async with Setup() as setup:
            with pytest.raises(ModelNotFound, match="no model 'x'"):
                await collect(setup.gateway, generation(model="x"))

    run(test())


def test_a_burst_is_spread_over_the_instances():
    async def test():
        async with Setup() as setup:
            for name in "ab":
                setup.instance(id=name).hold_after = 0
            tasks = [asyncio.create_task(collect(setup.gateway, generation())) for _ in range(80)]
            a, b = setup.instances
            await until(lambda: len(a.submitted) + len(b.submitted) == 80)
            assert min(len(a.submitted), len(b.submitted)) > 20
            a.release()
            b.release()
            await asyncio.gather(*tasks)

    run(test())


def test_routing_is_recorded_in_the_store():
    async def test():
        async with Setup() as setup:
            instance = setup.instance()
            await collect(setup.gateway, generation())
            request = instance.submitted[0].id
            assert setup.domain.metadata().get_assignment(request) == "instance-0"

    run(test())


def test_a_proxy_that_lost_its_mailbox_says_so():
    async def test():
        async with Setup() as setup:
            setup.instance().hold_after = 3
            await until(setup.gateway.is_ready)
            waiting = asyncio.create_task(collect(setup.gateway, generation()))
            await until(lambda: setup.instances[0].submitted)
            setup.domain.create_mailbox(ADDRESS)
            with pytest.raises(InstanceLost, match="mailbox"):
                await waiting
            assert not setup.gateway.is_ready()
            with pytest.raises(InstanceLost, match="mailbox"):
                await collect(setup.gateway, generation())

    run(test())


class Silent:
    """A part of a domain that does what it is told, and then says nothing: of `verbs`, while
    `is_silent()`."""

    def __init__(self, part, is_silent, verbs):
        self._part, self._is_silent, self._verbs = part, is_silent, verbs

    def __getattr__(self, name):
        found = getattr(self._part, name)
        if name in {"metadata", "open_mailbox"}:
            return lambda *given: Silent(found(*given), self._is_silent, self._verbs)
        return partial(self._act, found) if name in self._verbs else found

    def _act(self, act, *given):
        result = act(*given)
        if self._is_silent():
            raise StoreUnavailable("no answer")
        return result


@asynccontextmanager
async def silent_setup(*verbs, **settings):
    """A setup whose gateway hears nothing of `verbs` while the list that comes with it is empty."""
    setup, heard = Setup(**settings), [True]
    plain, setup.domain = setup.domain, Silent(setup.domain, lambda: not heard, verbs)
    async with setup:
        setup.domain = plain
        yield setup, heard


def test_a_request_whose_sending_got_no_answer_is_sent_again_and_cancelled_where_it_was():
    async def test():
        async with silent_setup("send") as (setup, heard):
            instance = setup.instance()
            instance.hold_after = 0  # else its tokens may be here before the silence is noticed
            heard.clear()
            task = asyncio.create_task(collect(setup.gateway, generation()))
            await until(lambda: len(instance.submitted) >= 2)
            heard.append(True)
            await until(lambda: instance.cancelled)
            instance.release()
            tokens, _ = await task
            assert tokens == TOKENS
            attempts = [request.attempt for request in instance.submitted]
            assert attempts == list(range(len(attempts)))

    run(test())


def test_a_request_waits_a_bounded_time_for_a_silent_store():
    async def test():
        async with silent_setup("sync_for_routing", patience_s=0.3) as (setup, heard):
            instance = setup.instance()
            heard.clear()
            await asyncio.sleep(0.01)
            with pytest.raises(StoreUnavailable, match="no answer"):
                await collect(setup.gateway, generation())
            task = asyncio.create_task(collect(setup.gateway, generation()))
            await asyncio.sleep(0.05)
            heard.append(True)
            assert (await task)[0] == TOKENS
            assert len(instance.submitted) == 1

    run(test())
