"""A load replayed against a server: requests at their times, tokens timed where they arrive."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import httpx
import msgspec

from aegaeon.metrics import Served, switch_time_share
from aegaeon.sim.workloads import Arrival, Load
from benchmark.serving import ServerError

WARM_UP_S = 120.0  # for the first answer of all: weights come from files
LATE_S = 120.0  # after the last arrival, until the last token


@dataclass(frozen=True)
class Health:
    """What the instances did between two looks; the shares of their time that they switched, and
    that they had requests and computed nothing, while weights or KV came in; and what steps took,
    in multiples of what they were measured to take when nothing else ran."""

    switches: int
    switch_share: float
    stall_share: float
    slowness: float


class _Look(NamedTuple):
    """All instances together, since their start."""

    devices: int
    switches: int
    switch_s: float
    stall_s: float
    compute_s: float
    expected_s: float


async def replay(url: str, models: Sequence[str], load: Load) -> tuple[list[Served], Health]:
    """Send `load` to the server at `url`; return what became of each request, and the switches.

    All models answer once before, so that none is read from its files any more. Raises ServerError.
    """
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        try:
            for model in models:
                warm = Arrival(0.0, model, 8, 2)
                await asyncio.wait_for(_ask(client, warm, time.monotonic()), WARM_UP_S)
            before = await _look(client)
            began_s = time.monotonic()
            tasks = [asyncio.create_task(_at_its_time(client, one, began_s)) for one in load]
            _, late = await asyncio.wait(tasks, timeout=load[-1].at_s + LATE_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
            elapsed_s = time.monotonic() - began_s
            after = await _look(client)
        except (httpx.HTTPError, asyncio.TimeoutError) as error:
            raise ServerError(f"the server does not answer: {error!r}") from None
    switch_s, stall_s = after.switch_s - before.switch_s, after.stall_s - before.stall_s
    served = [
        _missed(one) if task.cancelled() else task.result()
        for one, task in zip(load, tasks, strict=True)
    ]
    expected_s = after.expected_s - before.expected_s
    slowness = (after.compute_s - before.compute_s) / expected_s if expected_s > 0 else 1.0
    return served, Health(
        after.switches - before.switches,
        switch_time_share(switch_s, before.devices, elapsed_s),
        switch_time_share(stall_s, before.devices, elapsed_s),
        slowness,
    )


def _missed(one: Arrival) -> Served:
    return Served(one.model, one.at_s, (), one.output_tokens, is_failed=True)


async def _at_its_time(client: httpx.AsyncClient, one: Arrival, began_s: float) -> Served:
    await asyncio.sleep(max(0.0, began_s + one.at_s - time.monotonic()))
    return await _ask(client, one, began_s)


async def _ask(client: httpx.AsyncClient, one: Arrival, began_s: float) -> Served:
    """Ask for as many tokens as `one` wants; an error of the server is a failed request."""
    body = {
        "model": one.model,
        "prompt": "the " * one.prompt_tokens,
        "max_tokens": one.output_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    times_s: list[float] = []
    try:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            is_failed = answer.status_code != 200
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    chunk = msgspec.json.decode(line.removeprefix("data: "))
                    is_failed = is_failed or "error" in chunk
                    made = (chunk.get("usage") or {}).get("completion_tokens", 0)
                    now = time.monotonic() - began_s
                    times_s += [now] * (made - len(times_s))
    except httpx.HTTPError:
        is_failed = True
    return Served(one.model, one.at_s, tuple(times_s), one.output_tokens, is_failed)


async def _look(client: httpx.AsyncClient) -> _Look:
    instances = (await client.get("/health", timeout=10.0)).json()["instances"]
    seconds = ("switch_s", "stall_s", "compute_s", "expected_s")
    return _Look(
        len(instances),
        sum(int(one["switches"]) for one in instances),
        *(sum(float(one[kind]) for one in instances) for kind in seconds),
    )
