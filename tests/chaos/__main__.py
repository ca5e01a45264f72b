"""`python -m tests.chaos`: 50 streams over six models on two instances while processes die.

First every question is asked in peace, then all of them again and again under faults. Exit code 1
where a stream that its client kept had other tokens or no proper end, or anything is left held.
"""

import argparse
import asyncio
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.chaos.faults import Faults
from tests.chaos.leaks import KV_GB, growth, left_behind, left_open, watch
from tests.chaos.report import Outcome, streams_of, tell, to_json
from tests.chaos.streams import Crowd, Deaths, Question
from tests.support.checkpoints import make_checkpoint
from tests.support.redis_server import RedisServer
from tests.support.server import Server

FAMILIES = ("llama", "qwen2", "qwen3")
MODELS = 6
QUESTIONS = 36
# Four of the six models at a time, and KV for about half of what is asked.
CACHE_GB = 0.0013
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
def running(directory: Path, store: str) -> Iterator[tuple[Server, RedisServer | None]]:
    """Serve six models on two instances."""
    models = {
        f"model-{number}": make_checkpoint(
            directory / f"model-{number}", FAMILIES[number % 3], seed=number,
            max_position_embeddings=4096,
        )
        for number in range(MODELS)
    }  # fmt: skip
    flags = [
        "--models-dir",
        str(directory),
        "--colocated-count",
        "2",
        "--kv-budget-gb",
        str(KV_GB),
        "--lease-s",
        "4",
    ]
    flags += ["--model-cache-budget-gb", str(CACHE_GB), "--slo-ttft-s", "1", "--slo-tbt-s", "0.05"]
    redis = None
    if store == "redis":
        redis = RedisServer(directory)
        redis.start()
        flags += ["--metadata-backend", "redis", "--redis-url", redis.url]
    try:
        with Server(directory, models, *flags) as server:
            yield server, redis
    finally:
        if redis is not None:
            redis.kill()


async def disturb(
    server: Server, redis: RedisServer | None, given: argparse.Namespace
) -> tuple[Crowd, Faults, float, list[str]]:
    """Run the crowd under faults; return it, what was done, the growth, and what is left."""
    dice = random.Random(given.seed)
    models = [f"model-{number}" for number in range(MODELS)]
    answers = await in_peace(server.url, make_questions(models, dice))
    deaths = Deaths()
    crowd = Crowd(server.url, answers, deaths, dice)
    faults = Faults(server, deaths, redis, dice)
    until_s = asyncio.get_running_loop().time() + given.seconds
    samples: list = []
    asking = asyncio.create_task(crowd.run(given.streams))
    watching = asyncio.create_task(watch(server, samples, until_s))
    await faults.run(until_s, given.every)
    crowd.stop()
    await asyncio.gather(asking, watching)
    return crowd, faults, growth(samples), await left_open(server)


def one_run(store: str, given: argparse.Namespace) -> Outcome:
    """Return what came of a run over `store`."""
    with tempfile.TemporaryDirectory() as directory:
        with running(Path(directory), store) as (server, redis):
            domain = server.domain
            crowd, faults, grown, left = asyncio.run(disturb(server, redis, given))
            if given.keep_log:
                Path(given.keep_log).write_bytes(server.log.read_bytes())
        left += left_behind(domain)
    return Outcome(
        store=store,
        seconds=given.seconds,
        faults=dict(faults.done),
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
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep-log", default="", help="write the server's log there")
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    given = parser.parse_args(arguments)
    outcomes = []
    for store in STORES if given.store == "both" else (given.store,):
        outcomes.append(one_run(store, given))
        if not given.json:
            tell(outcomes[-1])
    if given.json:
        sys.stdout.write(to_json(outcomes) + "\n")
    return int(not all(outcome.is_good for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
