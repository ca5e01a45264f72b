"""`python -m tests.chaos`: 50 streams over six models on two instances while processes die.

First every question is asked in peace, then all of them again and again under faults. Exit code 1
where a stream that its client kept had other tokens or no proper end, or anything is left held.
"""

import argparse
import asyncio
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from aegaeon.config import check_settings
from aegaeon.store.names import SHARED_MEMORY
from tests.chaos.faults import Faults
from tests.chaos.leaks import (
    INSTANCES,
    KV_GB,
    MARK,
    MODELS,
    Sample,
    growth,
    left_behind,
    left_open,
    watch,
)
from tests.chaos.plan import LEASE_S, draw
from tests.chaos.proxies import Deaths, Front, Proxies, front_of
from tests.chaos.report import Outcome, streams_of, tell, to_json
from tests.chaos.streams import Crowd, Question
from tests.support.checkpoints import make_checkpoint
from tests.support.redis_server import RedisServer
from tests.support.server import Server

FAMILIES = ("llama", "qwen2", "qwen3")
QUESTIONS = 36
# Four of the six models at a time, and KV for about half of what is asked.
SETTINGS: dict[str, Any] = {
    "colocated_count": INSTANCES,
    "lease_s": LEASE_S,
    "kv_budget_gb": KV_GB,
    "model_cache_budget_gb": 0.0013,
    "slo_ttft_s": 1,
    "slo_tbt_s": 0.05,
}
PROMPTS = ("the device", "def main():", "She sells sea shells", "a model between tokens " * 8)
STORES = ("shared_memory", "redis")


def make_questions(models: Sequence[str], dice: random.Random) -> list[Question]:
    """Return questions to all models, short and long."""
    return [
        Question(
            model=models[number % len(models)],
            prompt=dice.choice(PROMPTS),
            max_tokens=dice.choice((3, 20, 60, 150, 300)),
            seed=number,
        )
        for number in range(QUESTIONS)
    ]


async def in_peace(url: str, questions: Sequence[Question]) -> dict[Question, str]:
    """Ask each question alone; return the answers."""
    answers = {}
    async with httpx.AsyncClient(timeout=120) as http:
        for question in questions:
            body = question.body() | {"stream": False}
            answer = (await http.post(f"{url}/v1/completions", json=body)).raise_for_status()
            answers[question] = answer.json()["choices"][0]["text"]
    return answers


@contextmanager
def running(directory: Path, store: str) -> Iterator[tuple[Server, Front, RedisServer | None]]:
    """Serve six models on two instances, behind a proxy of the server's and some of uvicorn's."""
    models = {
        f"model-{number}": make_checkpoint(
            directory / f"model-{number}", FAMILIES[number % 3], seed=number,
            max_position_embeddings=4096,
        )
        for number in range(MODELS)
    }  # fmt: skip
    os.environ.update([MARK.split("=")])
    with ExitStack() as stack:
        redis, settings = None, SETTINGS | {"models_dir": str(directory)}
        if store == "redis":
            # Each write is synced: where that is memory, others than its disk are under test.
            kept = stack.enter_context(tempfile.TemporaryDirectory(dir=SHARED_MEMORY))
            redis = RedisServer(Path(kept))
            redis.start()
            stack.callback(redis.kill)
            settings |= {"metadata_backend": "redis", "redis_url": redis.url}
        flags = [part for name, value in settings.items() for part in (_flag(name), str(value))]
        server = stack.enter_context(Server(directory, models, *flags))
        settings |= {"domain": server.domain, "models": [f"{x}={y}" for x, y in models.items()]}
        front = stack.enter_context(front_of(server, check_settings(settings)))
        yield server, front, redis


def _flag(setting: str) -> str:
    return f"--{setting.replace('_', '-')}"


async def disturb(
    proxies: Proxies, faults: Faults, deaths: Deaths, given: argparse.Namespace
) -> tuple[Crowd, float]:
    """Run the crowd under faults; return it, and the growth of memory."""
    models = [f"model-{number}" for number in range(MODELS)]
    questions = make_questions(models, random.Random(given.seed))
    answers = await in_peace(proxies.urls()[0], questions)
    crowd = Crowd(proxies, answers, deaths, given.seed)
    samples: list[Sample] = []
    asking = asyncio.create_task(crowd.run(given.streams))
    watching = asyncio.create_task(watch(proxies, samples))
    await faults.run(given.seconds)
    crowd.stop()
    watching.cancel()
    await asyncio.gather(asking)
    return crowd, growth(samples)


def one_run(store: str, given: argparse.Namespace) -> Outcome:
    """Return what came of a run over `store`."""
    plan = draw(given.seed, given.seconds, given.every, has_redis=store == "redis")
    with tempfile.TemporaryDirectory() as directory:
        with running(Path(directory), store) as (server, front, redis):
            proxies, deaths = Proxies(server, front), Deaths()
            faults = Faults(server, proxies, deaths, redis, plan)
            try:
                crowd, grown = asyncio.run(disturb(proxies, faults, deaths, given))
                left = asyncio.run(left_open(server, proxies))
            finally:
                if given.keep_log:
                    kept = server.log.read_bytes() + front.log.read_bytes()
                    Path(given.keep_log).write_bytes(kept)
        left += left_behind(server.domain)
    return Outcome(
        store=store,
        seed=given.seed,
        seconds=given.seconds,
        faults=sorted(faults.done, key=lambda done: done.at_s),
        streams=streams_of(crowd.tally),
        examples=crowd.tally.examples,
        growth=round(grown, 3),
        left=left,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 1 where something happened that must not."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=150, help="of faults, for each store")
    parser.add_argument("--store", choices=[*STORES, "both"], default="both")
    parser.add_argument("--streams", type=int, default=50, help="open at once")
    parser.add_argument("--every", type=float, default=3.0, help="seconds from fault to fault")
    parser.add_argument("--seed", type=int, default=1, help="of questions and faults")
    parser.add_argument("--times", action="store_true", help="tell of each fault, and when it was")
    parser.add_argument("--keep-log", default="", help="write the processes' logs there")
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    given = parser.parse_args(arguments)
    outcomes = []
    for store in STORES if given.store == "both" else (given.store,):
        outcomes.append(one_run(store, given))
        if not given.json:
            tell(outcomes[-1], given.times)
    if given.json:
        sys.stdout.write(to_json(outcomes) + "\n")
    return int(not all(outcome.is_good for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
