"""Clients: each asks one of a set of questions, reads the answer to its end, and judges it."""

import asyncio
import enum
import json
import random
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec

from tests.chaos.proxies import Deaths, Proxies

WHOLE_S = 180.0  # for an answer, however often it is disturbed
BACKOFF_S = 0.3  # after a refusal
SETTLE_S = 0.5
# In which a proxy that nobody else stands in for is there again, though Redis may be silent.
RESTART_S = 40.0


class Question(msgspec.Struct, frozen=True):
    """A request, the same whenever it is asked."""

    model: str
    prompt: str
    max_tokens: int
    seed: int

    def body(self) -> dict[str, object]:
        """Return what is posted to /v1/completions."""
        return {
            "model": self.model,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "temperature": 0.8,
            "ignore_eos": True,
            "stream": True,
        }


class End(enum.Enum):
    """How a stream ended."""

    SAME = "complete, and the tokens of peace"
    DROPPED = "dropped by its client"
    REFUSED = "refused before it began, in shape"
    PROXY_DIED = "broken by the death of its proxy"
    UNHEARD = "not begun: its proxy had died, and the next one did not listen yet"
    FAILED = "ended in a well-formed error"
    WRONG = "other tokens"
    TORN = "ended without a word"
    HUNG = "did not end"


# Whatever else happens, these must not.
FORBIDDEN = frozenset({End.FAILED, End.WRONG, End.TORN, End.HUNG})


@dataclass
class Tally:
    """What came of all streams, and examples of what should not have."""

    ends: Counter[End] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def note(self, end: End, question: Question, told: str) -> None:
        """Count a stream's end."""
        self.ends[end] += 1
        if end in FORBIDDEN and len(self.examples) < 20:
            self.examples.append(f"{end.name} {question.model} {question.max_tokens}: {told[:200]}")


class Crowd:
    """So many clients at once, until told to stop. Each has one proxy, or those of one address."""

    def __init__(
        self, proxies: Proxies, answers: Mapping[Question, str], deaths: Deaths, seed: int
    ) -> None:
        self.tally = Tally()
        self._proxies = proxies
        self._answers = answers
        self._deaths = deaths
        self._seed = seed
        self._is_over = False

    def stop(self) -> None:
        """Begin no more streams."""
        self._is_over = True

    async def run(self, clients: int) -> None:
        """Ask until `stop`; returns when all streams have ended."""
        urls = self._proxies.urls()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=30.0, limits=limits) as http:
            asking = (self._client(http, n, urls[n % len(urls)]) for n in range(clients))
            await asyncio.gather(*asking)

    async def _client(self, http: httpx.AsyncClient, number: int, url: str) -> None:
        dice = random.Random(f"client {number} {self._seed}")
        while not self._is_over:
            question = dice.choice(list(self._answers))
            drops = dice.randrange(2, 40) if dice.random() < 0.1 else None
            stream = Stream(question, url, drops, self._answers[question])
            try:
                end, told = await asyncio.wait_for(stream.read(http), WHOLE_S)
            except asyncio.TimeoutError:
                end, told = End.HUNG, f"after {WHOLE_S} s"
            except (httpx.HTTPError, json.JSONDecodeError) as error:
                end, told = End.TORN, repr(error)
            if end in {End.TORN, End.FAILED, End.HUNG} and await self._is_forgiven(stream):
                end = End.PROXY_DIED if stream.port else End.UNHEARD
            where = "its own" if self._proxies.is_alone(url) else "a worker"
            self.tally.note(end, question, f"at {where}: {told}")
            if end in {End.REFUSED, End.PROXY_DIED, End.UNHEARD}:
                await asyncio.sleep(BACKOFF_S * (0.5 + dice.random()))

    async def _is_forgiven(self, stream: "Stream") -> bool:
        """Whether it was its own proxy that has died: the one that had its connection, or, where
        it got no word, the only one that could have given it."""
        await asyncio.sleep(SETTLE_S)  # a process that was killed is gone a moment later
        if self._deaths.struck(stream.port, stream.began_s):
            return True
        is_alone = self._proxies.is_alone(stream.url)
        since_s = stream.began_s - RESTART_S
        return is_alone and not stream.has_begun and self._deaths.any_alone(since_s)


class Stream:
    """One answer, as its client sees it. `port` is the client's, once there is a connection."""

    def __init__(self, question: Question, url: str, drops: int | None, expected: str) -> None:
        """The client goes away after so many chunks as `drops` says."""
        self.url = url
        self.port: int | None = None
        self.has_begun = False
        self.began_s = time.monotonic()
        self._question = question
        self._drops = drops
        self._expected = expected

    async def read(self, http: httpx.AsyncClient) -> tuple[End, str]:
        """Ask, and read to the end. Raises httpx.HTTPError and ValueError where it is torn."""
        text: list[str] = []
        finish, is_done = None, False
        options = {"json": self._question.body(), "extensions": {"trace": self._note}}
        async with http.stream("POST", f"{self.url}/v1/completions", **options) as answer:
            if answer.status_code != 200:
                return _refusal(answer.status_code, await answer.aread())
            self.has_begun = True
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    is_done = True
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    return End.FAILED, f"after {len(text)} pieces: {json.dumps(chunk['error'])}"
                text.append(chunk["choices"][0]["text"])
                finish = chunk["choices"][0]["finish_reason"] or finish
                if self._drops is not None and len(text) >= self._drops:
                    return End.DROPPED, ""
        if not is_done or finish is None:
            return End.TORN, f"after {len(text)} pieces, finish {finish}"
        whole = "".join(text)
        if whole != self._expected:
            return End.WRONG, f"{whole[-80:]!r}, not {self._expected[-80:]!r}"
        return End.SAME, ""

    async def _note(self, event: str, info: dict[str, Any]) -> None:
        if event == "connection.connect_tcp.complete":
            self.port = info["return_value"].get_extra_info("client_addr")[1]


def _refusal(status: int, body: bytes) -> tuple[End, str]:
    error = json.loads(body)["error"]
    if status in {404, 429, 503} and {"message", "type", "code"} <= set(error):
        return End.REFUSED, error["code"]
    return End.FAILED, f"{status} {error}"
