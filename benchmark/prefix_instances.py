"""Second turns of chats at a server of two instances, over HTTP: while a stream of another model
runs where the first turn was, and where one instance prefills and the other one decodes."""

import contextlib
import http.client
import json
import random
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import NamedTuple

from aegaeon.memory.kv import BLOCK_TOKENS
from benchmark.report_rows import Aim, Row, measured, progress
from benchmark.serving import ServerError, running_server
from benchmark.switch_engine import PROMPT_IDS

PATIENCE_S = 60.0
INSTANCES = 2
CHAT, BESIDE, BEFORE = MODELS = ("chat", "beside", "before")
# What instances publish is seen by then.
SETTLED_S = 0.5
STREAM_TOKENS = 1000


class Turns(NamedTuple):
    """Tokens of a chat: its first prompt, the answer, and what is said then."""

    prompt: int
    answer: int
    more: int

    @property
    def second(self) -> int:
        """Tokens of the second prompt."""
        return self.prompt + self.answer + self.more


def token_ids(count: int, seed: str) -> list[int]:
    """Return ids that every vocabulary has."""
    return random.Random(seed).choices(range(1, PROMPT_IDS), k=count)


SAID = 7  # the token that answers are made of, so that second turns have it where it was


class Heard(NamedTuple):
    """Of an answer: seconds to its first token, and of how many tokens of its prompt keys and
    values were there."""

    first_s: float
    cached: int


def send(url: str, model: str, prompt: Sequence[int], tokens: int) -> http.client.HTTPResponse:
    """Ask for so many tokens, all of them the same one; return the stream."""
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logit_bias": {str(SAID): 100},
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    answer: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=PATIENCE_S)
    return answer


@contextlib.contextmanager
def running(url: str, model: str) -> Iterator[None]:
    """Have a model make tokens meanwhile."""
    with send(url, model, token_ids(8, model), STREAM_TOKENS) as answer:
        while not answer.readline().startswith(b"data: {"):
            pass
        time.sleep(SETTLED_S)
        yield


def ask(url: str, prompt: Sequence[int], tokens: int) -> Heard:
    """Have the model of the chats answer with so many tokens."""
    first_s, cached, began_s = 0.0, 0, time.perf_counter()
    with send(url, CHAT, prompt, tokens) as answer:
        for line in answer:
            event = line.removeprefix(b"data: ").strip()
            if not event.startswith(b"{"):
                continue
            first_s = first_s or time.perf_counter() - began_s
            usage = json.loads(event).get("usage")
            cached = usage["prompt_tokens_details"]["cached_tokens"] if usage else cached
    return Heard(first_s, cached)


def talk(url: str, turns: Turns, repeats: int) -> tuple[list[Heard], list[Heard]]:
    """Return what second turns heard, and prompts as long that nobody has sent before."""
    second, other = [], []
    for at in range(repeats):
        prompt = token_ids(turns.prompt, f"chat {at}")
        more = [SAID] * turns.answer + token_ids(turns.more, f"more {at}")
        with contextlib.ExitStack() as beside:
            with running(url, BEFORE):  # so that the chat begins at the other instance
                ask(url, prompt, turns.answer)
                beside.enter_context(running(url, BESIDE))
            time.sleep(SETTLED_S)
            second.append(ask(url, [*prompt, *more], 1))
            other.append(ask(url, token_ids(turns.second, f"other {at}"), 1))
        time.sleep(SETTLED_S)
    return second, other


def talk_split(url: str, turns: Turns, repeats: int) -> tuple[list[Heard], list[Heard]]:
    """As `talk`, with nothing beside it."""
    second, other = [], []
    for at in range(repeats):
        prompt = token_ids(turns.prompt, f"split chat {at}")
        ask(url, prompt, turns.answer)
        time.sleep(SETTLED_S)
        more = [SAID] * turns.answer + token_ids(turns.more, f"more {at}")
        second.append(ask(url, [*prompt, *more], 1))
        other.append(ask(url, token_ids(turns.second, f"other split {at}"), 1))
    return second, other


class Case(NamedTuple):
    """A server of instances as `flags` say, and how chats are had there."""

    name: str
    flags: tuple[str, ...]
    talk: Callable[[str, Turns, int], tuple[list[Heard], list[Heard]]]


CASES = (
    Case(f"{INSTANCES} instances, of which one is busy", (f"--colocated-count={INSTANCES}",), talk),
    Case(
        "one instance that prefills and one that decodes",
        ("--colocated-count=0", "--prefill-count=1", "--decode-count=1"),
        talk_split,
    ),
)


def measure_instances(model: str, name: str, turns: Turns, repeats: int) -> list[Row]:
    """Milliseconds to the first token of a second turn at servers of two instances; the peer is as
    in `prefixes.py`. What is found is told. Raises ServerError."""
    return [_measure(model, name, case, turns, repeats) for case in CASES]


def _measure(model: str, name: str, case: Case, turns: Turns, repeats: int) -> Row:
    progress(f"{name}: {case.name}, turns of {turns.prompt} and {turns.second} tokens")
    flags = [
        f"--models={','.join(f'{one}={model}' for one in MODELS)}",
        *case.flags,
        "--threads-per-instance=1",
        f"--domain=prefixes-{random.randrange(1 << 32):08x}",
        "--drain-s=2",
    ]
    with tempfile.TemporaryFile("w+", prefix="aegaeon-prefixes-") as log:
        try:
            with running_server(flags, log) as url:
                for one in MODELS:
                    send(url, one, token_ids(turns.more, one), 2).read()
                second, other = case.talk(url, turns, repeats)
        except (ServerError, OSError) as error:
            log.seek(0)
            raise ServerError(f"{error}; it said: {log.read()[-2000:]}") from None
    # The last token of an answer is made, and never run.
    known = turns.prompt + turns.answer - 1
    found = sum(heard.cached >= known // BLOCK_TOKENS * BLOCK_TOKENS for heard in second)
    row = Row(
        case=f"{name}, {case.name}: first token of a second turn, {turns.second} tokens, of which "
        f"{known} have been run ({found} of {repeats} found them)",
        unit="ms",
        ours=1e3 * median(heard.first_s for heard in second),
        peer="all of it prefilled",
        peer_value=1e3 * median(heard.first_s for heard in other),
    )
    least = turns.second / (turns.second - turns.prompt) / 2
    aim = Aim("ratio_to_peer", least, f">= {least:.1f} x")
    return measured(row, aim, less_is_better=True)
