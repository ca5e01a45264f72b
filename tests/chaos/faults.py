"""What befalls the server, as it was planned; each fault is mended by itself or by the server."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TypeVar

import httpx

from tests.chaos.plan import Done, Planned
from tests.chaos.proxies import Deaths, Proxies, Proxy, instance_pids
from tests.support.redis_server import RedisServer
from tests.support.server import Server

ADD_S = 120.0  # for a model to drain, whatever befalls those that have requests of it
AGAIN_S = 10.0  # for what was killed to be started
# Between two outages: in one after the other no token moves, and clients go after 30 s without any.
REDIS_PEACE_S = 2.0
NOBODY = ""

_T = TypeVar("_T")
Fault = Callable[[Planned], Awaitable[str]]


class Faults:
    """Does what is planned, one thing beside the other where they last; `done` tells of it."""

    def __init__(
        self, server: Server, proxies: Proxies, deaths: Deaths, redis: RedisServer | None,
        plan: Sequence[Planned], model: str = "model-5",
    ) -> None:  # fmt: skip
        """`model` is the one that is removed now and then."""
        self.done: list[Done] = []
        self._server = server
        self._proxies = proxies
        self._deaths = deaths
        self._redis = redis
        self._plan = plan
        self._model = model
        self._redis_is_free = asyncio.Lock()
        self._model_is_free = asyncio.Lock()
        self._supervisor_is_free = asyncio.Lock()
        self._kinds: dict[str, Fault] = {
            "an instance killed": self._kill_instance,
            "both instances killed": self._kill_all,
            "an instance killed as it starts": self._kill_starting,
            "an instance paused": self._pause_instance,
            "an instance paused past its lease": self._pause_instance,
            "a proxy killed": self._kill_proxy,
            "a proxy paused": self._pause_proxy,
            "a proxy paused for long": self._pause_proxy,
            "the supervisor paused": self._pause_supervisor,
            "a model removed and added again": self._remove_and_add,
            "Redis killed and started again": self._kill_redis,
            "Redis killed while a model is removed": self._kill_redis_and_remove,
            "Redis paused": self._pause_redis,
            "Redis paused past all leases": self._pause_redis,
        }

    async def run(self, seconds: float) -> None:
        """Do all of it; returns when that is over, `seconds` from now at the earliest."""
        began_s = time.monotonic()
        tasks = [asyncio.create_task(self._do(planned, began_s)) for planned in self._plan]
        await asyncio.gather(asyncio.sleep(seconds), *tasks)

    async def _do(self, planned: Planned, began_s: float) -> None:
        await asyncio.sleep(planned.at_s)
        at_s = time.monotonic()
        whom = await self._kinds[planned.what](planned)
        if whom != NOBODY:
            took_s = round(time.monotonic() - at_s, 2)
            self.done.append(Done(round(at_s - began_s, 2), planned.what, whom, took_s))

    # Instances

    async def _kill_instance(self, planned: Planned) -> str:
        pid = _picked(instance_pids(self._server), planned)
        return f"pid {pid}" if pid is not None and _signal(pid, signal.SIGKILL) else NOBODY

    async def _kill_all(self, planned: Planned) -> str:
        pids = [pid for pid in instance_pids(self._server) if _signal(pid, signal.SIGKILL)]
        return f"pids {pids}" if pids else NOBODY

    async def _pause_instance(self, planned: Planned) -> str:
        pid = _picked(instance_pids(self._server), planned)
        if pid is None or not _signal(pid, signal.SIGSTOP):
            return NOBODY
        try:
            await asyncio.sleep(planned.lasts_s)
        finally:
            has_lasted = _signal(pid, signal.SIGCONT)
        return f"pid {pid}" if has_lasted else f"pid {pid}, given up before"

    async def _kill_starting(self, planned: Planned) -> str:
        """Kill one, and the one that is started in its place."""
        before = instance_pids(self._server)
        pid = _picked(before, planned)
        if pid is None or not _signal(pid, signal.SIGKILL):
            return NOBODY
        give_up_s = time.monotonic() + AGAIN_S
        while not (new := set(instance_pids(self._server)) - set(before)):
            if time.monotonic() > give_up_s:
                return f"pid {pid}, of which there is none again"
            await asyncio.sleep(0.01)
        await asyncio.sleep(planned.lasts_s)
        killed = [one for one in new if _signal(one, signal.SIGKILL)]
        return f"pid {pid}, then {killed}"

    async def _pause_supervisor(self, planned: Planned) -> str:
        """Nobody is buried or started meanwhile."""
        if self._supervisor_is_free.locked():
            return NOBODY
        async with self._supervisor_is_free:
            os.kill(self._server.pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(planned.lasts_s)
            finally:
                os.kill(self._server.pid, signal.SIGCONT)
        return f"pid {self._server.pid}"

    # Proxies

    async def _kill_proxy(self, planned: Planned) -> str:
        proxy = await self._stopped_proxy(planned)
        return proxy.name if proxy is not None and _signal(proxy.pid, signal.SIGKILL) else NOBODY

    async def _pause_proxy(self, planned: Planned) -> str:
        proxy = await self._stopped_proxy(planned)
        if proxy is None:
            return NOBODY
        try:
            await asyncio.sleep(planned.lasts_s)
        finally:
            has_lasted = _signal(proxy.pid, signal.SIGCONT)
        self._deaths.forget(proxy)
        return proxy.name if has_lasted else f"{proxy.name}, given up before"

    async def _stopped_proxy(self, planned: Planned) -> Proxy | None:
        """Stop one, and note whom it serves: it may not go on, whatever we mean to do."""
        proxy = _picked(await asyncio.to_thread(self._proxies.living), planned)
        if proxy is None or not _signal(proxy.pid, signal.SIGSTOP):
            return None
        with suppress(OSError):  # it is gone
            self._deaths.note(proxy)
        return proxy

    # Models

    async def _remove_and_add(self, planned: Planned) -> str:
        """Its streams end first; who asks for it meanwhile is refused."""
        url = f"{self._server.url}/admin/models"
        if self._model_is_free.locked():
            return NOBODY
        async with self._model_is_free, httpx.AsyncClient(timeout=30.0) as http:
            try:
                if (await http.delete(f"{url}/{self._model}")).status_code != 202:
                    return NOBODY
            except httpx.HTTPError:
                pass  # the proxy is between two lives; it may have heard us
            await asyncio.sleep(planned.lasts_s)
            return await self._add(http, url)

    async def _add(self, http: httpx.AsyncClient, url: str) -> str:
        asked = {"reference": self._model, "id": self._model}
        give_up_s = time.monotonic() + ADD_S
        while time.monotonic() < give_up_s:
            with suppress(httpx.HTTPError):
                answer = await http.post(url, json=asked)
                if answer.status_code == 201 or await self._is_served(http, answer.status_code):
                    return self._model
            await asyncio.sleep(0.5)  # it still drains, or there is no proxy
        return f"{self._model}, not added again"

    async def _is_served(self, http: httpx.AsyncClient, status: int) -> bool:
        """Whether the name is taken by the model itself, which stays: somebody had heard us."""
        if status != 409:
            return False
        card = await http.get(f"{self._server.url}/v1/models/{self._model}")
        return card.status_code == 200 and card.json()["status"] != "draining"

    # Redis

    async def _kill_redis(self, planned: Planned) -> str:
        assert self._redis is not None
        if self._redis_is_free.locked():
            return NOBODY
        async with self._redis_is_free:
            self._redis.kill()
            await asyncio.sleep(planned.lasts_s)
            await asyncio.to_thread(self._redis.start)
            await asyncio.sleep(REDIS_PEACE_S)
        return "Redis"

    async def _kill_redis_and_remove(self, planned: Planned) -> str:
        """It is gone while the model drains, or before anybody has heard of it."""
        at_s = planned.pick  # up to a second: a request or two long
        removing = asyncio.create_task(self._remove_and_add(planned))
        await asyncio.sleep(at_s)
        done = [await self._kill_redis(planned), await removing]
        return ", ".join(one for one in done if one != NOBODY)

    async def _pause_redis(self, planned: Planned) -> str:
        assert self._redis is not None
        if self._redis_is_free.locked():
            return NOBODY
        async with self._redis_is_free:
            self._redis.pause()
            try:
                await asyncio.sleep(planned.lasts_s)
            finally:
                self._redis.go_on()
            await asyncio.sleep(REDIS_PEACE_S)
        return "Redis"


def _picked(found: Sequence[_T], planned: Planned) -> _T | None:
    """Return the one that is meant, if there is any."""
    return found[int(planned.pick * len(found))] if found else None


def _signal(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
