"""What befalls the server: one fault after another, at random, each mended by itself."""

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import httpx

from tests.chaos.streams import Deaths
from tests.support.redis_server import RedisServer
from tests.support.server import Server

PAUSE_S = (0.1, 3.0)
REDIS_AWAY_S = (0.1, 2.0)
ADD_TRIES = 60
PROXY = b"aegaeon.proxy.worker"


class Faults:
    """Does a fault every few seconds."""

    def __init__(
        self, server: Server, deaths: Deaths, redis: RedisServer | None, dice: random.Random,
        model: str = "model-5",
    ) -> None:  # fmt: skip
        """`model` is the one that is removed now and then."""
        self.done: Counter[str] = Counter()
        self._server = server
        self._deaths = deaths
        self._redis = redis
        self._dice = dice
        self._model = model

    def kinds(self) -> dict[str, Callable[[], Awaitable[bool]]]:
        """Return what can be done, by name."""
        kinds = {
            "an instance killed": self._kill_instance,
            "an instance paused": self._pause_instance,
            "both instances killed": self._kill_all,
            "the proxy killed": self._kill_proxy,
            "the proxy paused": self._pause_proxy,
            "a model removed and added again": self._remove_and_add,
        }
        if self._redis is not None:
            kinds["Redis killed and started again"] = self._kill_redis
        return kinds

    async def run(self, until_s: float, every_s: float) -> None:
        """Do faults until `until_s` of the loop's clock, each about `every_s` after the last."""
        loop = asyncio.get_running_loop()
        while loop.time() < until_s:
            await asyncio.sleep(every_s * (0.5 + self._dice.random()))
            name, fault = self._dice.choice(list(self.kinds().items()))
            if await fault():
                self.done[name] += 1

    async def _kill_instance(self) -> bool:
        pid = await self._one_instance()
        return pid is not None and _signal(pid, signal.SIGKILL)

    async def _kill_all(self) -> bool:
        pids = (await asyncio.to_thread(self._server.instance_pids)).values()
        return len(pids) > 1 and all(tuple(_signal(pid, signal.SIGKILL) for pid in pids))

    async def _pause_instance(self) -> bool:
        return await self._pause(await self._one_instance())

    async def _kill_proxy(self) -> bool:
        pid = await asyncio.to_thread(self._find_proxy)
        if pid is None:
            return False
        self._deaths.note()
        return _signal(pid, signal.SIGKILL)

    async def _pause_proxy(self) -> bool:
        return await self._pause(await asyncio.to_thread(self._find_proxy))

    async def _remove_and_add(self) -> bool:
        """Its streams end first; who asks for it meanwhile is refused."""
        url = f"{self._server.url}/admin/models"
        with suppress(httpx.HTTPError):  # the proxy is between two lives
            async with httpx.AsyncClient(timeout=10.0) as http:
                if (await http.delete(f"{url}/{self._model}")).status_code != 202:
                    return False
                await asyncio.sleep(self._dice.uniform(*PAUSE_S))
                return await self._add(http, url)
        return False

    async def _add(self, http: httpx.AsyncClient, url: str) -> bool:
        asked = {"reference": self._model, "id": self._model}
        for _ in range(ADD_TRIES):
            with suppress(httpx.HTTPError):
                if (await http.post(url, json=asked)).status_code in {201, 409}:
                    return True
            await asyncio.sleep(0.5)  # it still drains, or there is no proxy
        return False

    async def _kill_redis(self) -> bool:
        assert self._redis is not None
        self._redis.kill()
        await asyncio.sleep(self._dice.uniform(*REDIS_AWAY_S))
        await asyncio.to_thread(self._redis.start)
        return True

    async def _pause(self, pid: int | None) -> bool:
        if pid is None or not _signal(pid, signal.SIGSTOP):
            return False
        try:
            await asyncio.sleep(self._dice.uniform(*PAUSE_S))
        finally:
            _signal(pid, signal.SIGCONT)
        return True

    async def _one_instance(self) -> int | None:
        pids = await asyncio.to_thread(self._server.instance_pids)
        return self._dice.choice(list(pids.values())) if pids else None

    def _find_proxy(self) -> int | None:
        """Return the supervisor's child that is the proxy, unless it is between two lives."""
        for file in Path(f"/proc/{self._server.pid}/task").glob("*/children"):
            for pid in file.read_text().split():
                with suppress(OSError):
                    if PROXY in Path(f"/proc/{pid}/cmdline").read_bytes():
                        return int(pid)
        return None


def _signal(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
