"""Published traces as days to plan for: how many requests come when, and how long they are."""

import math
import random
from collections.abc import Sequence
from pathlib import Path

import msgspec

from aegaeon.errors import ConfigError
from aegaeon.sim.workloads import Arrival, Load, fit_length, read_arrivals
from aegaeon.types import ModelId

WINDOW_S = 300.0
MOST_LENGTHS = 20_000  # of a trace's requests, drawn, to draw from again


class Profile(msgspec.Struct, frozen=True):
    """`requests_per_s` of all models together, in each window of `window_s` from the start on, and
    (prompt, output) `lengths` in tokens to draw from."""

    window_s: float
    requests_per_s: tuple[float, ...]
    lengths: tuple[tuple[int, int], ...]

    @property
    def mean(self) -> float:
        """Requests a second."""
        return math.fsum(self.requests_per_s) / len(self.requests_per_s)

    @property
    def requests(self) -> float:
        """In all."""
        return self.window_s * math.fsum(self.requests_per_s)

    def scaled(self, factor: float) -> "Profile":
        """Return the same day with so many times the requests."""
        rates = tuple(factor * rate for rate in self.requests_per_s)
        return msgspec.structs.replace(self, requests_per_s=rates)

    def lasting(self, seconds: float, shape: Sequence[float] = (1.0,)) -> "Profile":
        """Return a profile of `seconds`: this one again and again, weighed by `shape`, whose
        numbers hold for equal parts of the time, with the mean as it is. Raises ConfigError."""
        windows = round(seconds / self.window_s)
        if windows < 1 or not shape or min(shape) < 0 or not 0 < math.fsum(shape) < math.inf:
            raise ConfigError(
                f"a day lasts {self.window_s:g} s or more; its shape has numbers of 0 or more"
            )
        rates = [
            self.requests_per_s[number % len(self.requests_per_s)]
            * shape[number * len(shape) // windows]
            for number in range(windows)
        ]
        scale = self.mean * windows / math.fsum(rates)
        whole = tuple(scale * rate for rate in rates)
        return msgspec.structs.replace(self, requests_per_s=whole)

    def as_load(self, model: ModelId, max_len: int) -> Load:
        """Return requests of all lengths, as long as `model` can take."""
        return tuple(
            fit_length(Arrival(0.0, model, prompt, output), max_len)
            for prompt, output in self.lengths
        )


def read_profile(path: Path, window_s: float = WINDOW_S, seed: int = 0) -> Profile:
    """Return what the trace at `path` says, of which only counts and a draw of lengths are kept.
    What follows the last full window is left out, unless that is all. Raises ConfigError."""
    draw = random.Random(seed)
    counts: dict[int, int] = {}
    lengths: list[tuple[int, int]] = []
    seen, last_s = 0, 0.0
    for one in read_arrivals(path):
        seen += 1
        number = int(one.at_s / window_s)
        counts[number] = counts.get(number, 0) + 1
        last_s = max(last_s, one.at_s)
        if len(lengths) < MOST_LENGTHS:  # a reservoir: each request with the same chance
            lengths.append((one.prompt_tokens, one.output_tokens))
        elif (place := draw.randrange(seen)) < MOST_LENGTHS:
            lengths[place] = (one.prompt_tokens, one.output_tokens)
    if not seen:
        raise ConfigError(f"{path} has no requests")
    windows = int(last_s / window_s)
    if windows:
        rates = tuple(counts.get(number, 0) / window_s for number in range(windows))
    else:
        rates = (seen / max(last_s, 1.0),)
    return Profile(window_s, rates, tuple(lengths))


def laid_over(profiles: Sequence[Profile]) -> Profile:
    """Return all at once, for as long as the longest lasts; shorter ones begin again."""
    windows = max(len(one.requests_per_s) for one in profiles)
    rates = tuple(
        math.fsum(one.requests_per_s[n % len(one.requests_per_s)] for one in profiles)
        for n in range(windows)
    )
    # Each gives as many lengths as its part of the requests asks for.
    whole = math.fsum(one.mean for one in profiles)
    lengths: list[tuple[int, int]] = []
    for one in profiles:
        count = max(1, round(MOST_LENGTHS * one.mean / whole))
        lengths += [one.lengths[n % len(one.lengths)] for n in range(count)]
    return Profile(profiles[0].window_s, rates, tuple(lengths))


def popularity(models: int, zipf: float) -> dict[ModelId, float]:
    """Return the share of all requests that each of `models` gets, like 1 / rank ** `zipf`. Raises
    ConfigError."""
    if models < 1 or not 0 <= zipf < math.inf:
        raise ConfigError("--models is at least 1, --zipf 0 or more")
    weights = [1 / rank**zipf for rank in range(1, models + 1)]
    whole = math.fsum(weights)
    return {f"model-{n:05d}": weight / whole for n, weight in enumerate(weights)}
