"""Many streams at once, of a few prompts, and what each is answered in peace."""

from collections.abc import Mapping, Sequence
from itertools import groupby

from tests.support.polling import eventually
from tests.support.server import Streamed

TOKENS = 300
PROMPTS = tuple(f"the device {number}" for number in range(6))


def begun(url: str, count: int = len(PROMPTS), tokens: int = TOKENS) -> list[Streamed]:
    """Streams of the model `ada`, all of which have begun."""
    prompts = [PROMPTS[n % len(PROMPTS)] for n in range(count)]
    streams = [Streamed(url, "ada", prompt, tokens, seed=7) for prompt in prompts]
    eventually(lambda: all(stream.has_begun for stream in streams), within_s=60)
    return streams


def in_peace(url: str, tokens: int = TOKENS) -> dict[str, str]:
    """What each prompt is answered."""
    streams = begun(url, tokens=tokens)
    return {prompt: one.whole() for prompt, one in zip(PROMPTS, streams, strict=True)}


def assert_whole(streams: Sequence[Streamed], answers: Mapping[str, str]) -> None:
    """Each has ended, with the tokens of peace."""
    told = [stream.whole() for stream in streams]
    assert told == [answers[PROMPTS[n % len(PROMPTS)]] for n in range(len(streams))]


def lives(stream: Streamed) -> list[str]:
    """Where its tokens came from, one instance after the other."""
    return [instance for instance, _ in groupby(stream.instances)]
