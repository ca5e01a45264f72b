"""The gateway sends a chat's next turn where the last one went, among scripted instances: where
these cannot reach each other's keys and values."""

import asyncio

import pytest

from aegaeon.measures import Speed
from tests.proxy.test_gateway import Setup, collect, generation, run, until

FIRST = tuple(range(1, 101))
SECOND = (*FIRST, *range(200, 240))


def pair(setup):
    """Two instances; who has the first turn is said to be the busier one from here on."""
    return [setup.instance(id=name) for name in "ab"]


async def turns(setup):
    """A first turn, then a second one while the instance of the first is the busier; return the
    instances of both."""
    instances = {one.id: one for one in setup.instances}
    _, last = await collect(setup.gateway, generation(prompt_token_ids=FIRST))
    for name, one in instances.items():
        is_first = name == last.instance
        one.publish(load=0.9 if is_first else 0.0, speeds={"m": Speed(0.01, 0.0)}, resident=("m",))
    busy = instances[last.instance]._store
    await until(lambda: {row.status.load for row in busy.sync_for_routing()} == {0.0, 0.9})
    # Nor is the first turn open any more, for which its model's next request would go there.
    await until(lambda: not any(setup.gateway._outbox._sent.values()))
    await asyncio.sleep(0.02)  # what was read before is too old by then
    _, later = await collect(setup.gateway, generation(prompt_token_ids=SECOND))
    return last.instance, later.instance


def reasons(setup):
    return [one.reason for one in setup.gateway._outbox.choices.recent(None, 9)]


def test_a_chat_goes_on_where_it_was():
    async def test():
        async with Setup(device="staged") as setup:
            pair(setup)
            first, second = await turns(setup)
            assert first == second
            assert reasons(setup)[-1] == "prefix"

    run(test())


@pytest.mark.parametrize("settings", [{"prefix_cache": False, "device": "staged"}, {}])
def test_it_goes_where_the_policy_says_where_all_know_the_same(settings):
    """Without a prefix cache nothing; on the CPU, what any of them has left."""

    async def test():
        async with Setup(**settings) as setup:
            pair(setup)
            first, second = await turns(setup)
            assert first != second

    run(test())


def test_a_restarted_instance_knows_nothing():
    async def test():
        async with Setup(device="staged") as setup:
            a, b = pair(setup)
            _, last = await collect(setup.gateway, generation(prompt_token_ids=FIRST))
            dead = a if last.instance == "a" else b
            dead.die()
            setup.instances.remove(dead)
            again = setup.instance(id=dead.id, incarnation=2)
            for one in setup.instances:
                load = 0.9 if one is again else 0.0
                one.publish(load=load, speeds={"m": Speed(0.01, 0.0)})
            await asyncio.sleep(0.05)
            _, later = await collect(setup.gateway, generation(prompt_token_ids=SECOND))
            assert later.instance != dead.id and "prefix" not in reasons(setup)

    run(test())
