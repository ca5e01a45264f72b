"""Clients: each asks one of a set of questions, reads the answer to its end, and judges it."""

import asyncio
import enum
import json
import random
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx
import msgspec

WHOLE_S = 180.0  # for an answer, however often it is disturbed
BACKOFF_S = 0.3  # after a refusal


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


class Deaths:
    """When proxies died, so that streams may be forgiven that were open then."""

    def __init__(self) -> None:
        self._at_s: list[float] = []

    def note(self) -> None:
        """The proxy dies now, or is about to."""
        self._at_s.append(time.monotonic())

    def any_since(self, since_s: float) -> bool:
        """Whether one died while a stream was open that began at `since_s`."""
        return any(at_s >= since_s - 1.0 for at_s in self._at_s)


class Crowd:
    """So many clients at once, until told to stop."""

    def __init__(
        self, url: str, answers: Mapping[Question, str], deaths: Deaths, dice: random.Random
    ) -> None:
        self.tally = Tally()
        self.open = 0
        self._url = url
        self._answers = answers
        self._deaths = deaths
        self._dice = dice
        self._is_over = False

    def stop(self) -> None:
        """Begin no more streams."""
        self._is_over = True

    async def run(self, clients: int) -> None:
        """Ask until `stop`; returns when all streams have ended."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=30.0, limits=limits) as http:
            await asyncio.gather(*(self._client(http) for _ in range(clients)))

    async def _client(self, http: httpx.AsyncClient) -> None:
        while not self._is_over:
            question = self._dice.choice(list(self._answers))
            drops = self._dice.randrange(2, 40) if self._dice.random() < 0.1 else None
            began_s = time.monotonic()
            self.open += 1
            try:
                end, told = await asyncio.wait_for(self._ask(http, question, drops), WHOLE_S)
            except asyncio.TimeoutError:
                end, told = End.HUNG, f"after {WHOLE_S} s"
            except (httpx.HTTPError, json.JSONDecodeError) as error:
                end, told = End.TORN, repr(error)
            finally:
                self.open -= 1
            if end in {End.TORN, End.FAILED} and self._deaths.any_since(began_s):
                end = End.PROXY_DIED
            self.tally.note(end, question, told)
            if end in {End.REFUSED, End.PROXY_DIED}:
                await asyncio.sleep(BACKOFF_S * (0.5 + self._dice.random()))

    async def _ask(
        self, http: httpx.AsyncClient, question: Question, drops: int | None
    ) -> tuple[End, str]:
        text: list[str] = []
        finish, is_done = None, False
        url = f"{self._url}/v1/completions"
        async with http.stream("POST", url, json=question.body()) as answer:
            if answer.status_code != 200:
                return _refusal(answer.status_code, await answer.aread())
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    is_done = True
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    return End.FAILED, json.dumps(chunk["error"])
                text.append(chunk["choices"][0]["text"])
                finish = chunk["choices"][0]["finish_reason"] or finish
                if drops is not None and len(text) >= drops:
                    return End.DROPPED, ""
        if not is_done or finish is None:
            return End.TORN, f"after {len(text)} pieces, finish {finish}"
        whole = "".join(text)
        if whole != self._answers[question]:
            return End.WRONG, f"{whole[-80:]!r}, not {self._answers[question][-80:]!r}"
        return End.SAME, ""


def _refusal(status: int, body: bytes) -> tuple[End, str]:
    error = json.loads(body)["error"]
    if status in {404, 429, 503} and {"message", "type", "code"} <= set(error):
        return End.REFUSED, error["code"]
    return End.FAILED, f"{status} {error}"
