"""The loads of the serving benchmark: when requests are due, of which model, and their bodies."""

import argparse
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from aegaeon.errors import ConfigError
from aegaeon.load_flags import with_popularity
from aegaeon.sim.workloads import (
    Arrival,
    Load,
    lengths_of,
    models_of,
    poisson_of,
    read_load,
)
from aegaeon.types import ModelId

# Words that are one token, with the space before them, in all common vocabularies.
_WORDS = (
    *("the", "a", "of", "and", "to", "in", "is", "was", "for", "on", "that", "with", "as", "it"),
    *("by", "from", "at", "his", "an", "are", "were", "which", "this", "or", "be", "had", "first"),
    *("one", "their", "not", "new", "after", "who", "have", "has", "they", "its", "two", "but"),
)


# What is understood besides OpenAI's fields, so that answers have the length that was asked for:
# as by vLLM, llama.cpp and us; nothing, so that an answer may end earlier; as by transformers.
Dialect = Literal["vllm", "openai", "transformers"]


@dataclass(frozen=True)
class Ask:
    """What a request says besides model and prompt."""

    is_chat: bool = False
    dialect: Dialect = "vllm"

    @property
    def path(self) -> str:
        """Where it is posted."""
        return "/v1/chat/completions" if self.is_chat else "/v1/completions"

    def body(self, one: Arrival, number: int) -> bytes:
        """Return the JSON of request `number`; its prompt begins like no other's, so that no cache
        of prompts helps."""
        text = prompt_of(one.prompt_tokens, number)
        fields: dict[str, object] = {
            "model": one.model,
            "max_tokens": one.output_tokens,
            "temperature": 0,
            "stream": True,
        }
        if self.is_chat:
            fields["messages"] = [{"role": "user", "content": text}]
        else:
            fields["prompt"] = text
        match self.dialect:
            case "vllm":
                fields["ignore_eos"] = True
                usage = {"include_usage": True, "continuous_usage_stats": True}
                fields["stream_options"] = usage
            case "openai":
                fields["stream_options"] = {"include_usage": True}
            case "transformers":
                least = {"min_new_tokens": one.output_tokens, "do_sample": False}
                fields["generation_config"] = json.dumps(least)
        return msgspec.json.encode(fields)


def prompt_of(tokens: int, number: int) -> str:
    """Return about `tokens` tokens of words, drawn by `number`."""
    draw = random.Random(number)
    return " ".join(draw.choices(_WORDS, k=max(1, tokens)))


def renewal_of(
    rates: Mapping[ModelId, float],
    horizon_s: float,
    lengths: Sequence[tuple[int, int]],
    cv: float,
    seed: int = 0,
) -> Load:
    """Return requests whose distances have the coefficient of variation `cv`: 0 is a constant
    rate; those above 1, gamma distributed, come in bursts. Models and lengths are drawn as by
    `poisson_of`. Raises ConfigError."""
    rate = math.fsum(rates.values())
    if not 0 < rate < math.inf or not 0 <= cv < math.inf or not 0 < horizon_s < math.inf:
        raise ConfigError("a load needs a rate and a horizon above 0, and --cv of 0 or more")
    draw = random.Random(seed)
    weights = list(itertools.accumulate(rates.values()))
    names = tuple(rates)
    shape = 1 / cv**2 if cv else math.inf

    def distance_s() -> float:
        return 1 / rate if cv == 0 else draw.gammavariate(shape, 1 / (shape * rate))

    arrivals = []
    at_s = distance_s()
    while at_s < horizon_s:
        model = draw.choices(names, cum_weights=weights)[0]
        arrivals.append(Arrival(at_s, model, *draw.choice(lengths)))
        at_s += distance_s()
    return tuple(arrivals)


def renamed(load: Load, models: Sequence[ModelId]) -> Load:
    """Return `load` with its models called `models`, in the order in which they come and round
    again; those that are served under their own name keep it."""
    others = (name for name in models_of(load) if name not in models)
    names = dict(zip(others, itertools.cycle(models), strict=False))
    return tuple(msgspec.structs.replace(o, model=names.get(o.model, o.model)) for o in load)


def add_load_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `load_of` reads."""
    group = parser.add_argument_group("the load")
    add = group.add_argument
    add("--rate", metavar="R,...", default="1", help="requests/s of all models; several: in turn")
    add("--horizon-s", metavar="S", type=float, default=30.0, help="of a load (default: 30)")
    add(
        "--arrivals",
        choices=("poisson", "bursts", "constant"),
        default="poisson",
        help="poisson: independent of each other; bursts: gamma distributed distances of --cv",
    )
    add("--cv", type=float, default=3.0, help="of bursts: deviation over mean (default: 3)")
    add("--zipf", metavar="A", type=float, default=0.0, help="popularity: model k like 1/k^A")
    add("--trace", metavar="FILE", type=Path, help="a CSV file as `aegaeon simulate` reads, whole")
    add("--prompt-tokens", metavar="N,...", default="16,32,64,96", help="drawn from these, about")
    add("--output-tokens", metavar="N,...", default="16,32,48,64", help="drawn from these")
    add("--lengths", metavar="FILE", type=Path, help="draw both from the pairs of this CSV file")
    add("--seed", type=int, default=0, help="of all that is drawn")


def loads_of(options: argparse.Namespace, models: Sequence[ModelId]) -> dict[float, Load]:
    """Return the loads that the flags name, by their rate in requests per second. Raises
    ConfigError."""
    if options.trace is not None:
        load = renamed(read_load(options.trace, options.horizon_s), models)
        if not load:
            raise ConfigError(f"{options.trace} asks for nothing before --horizon-s")
        return {len(load) / options.horizon_s: load}
    try:
        rates = [float(rate) for rate in options.rate.split(",")]
        prompts, outputs = (
            [int(number) for number in text.split(",")]
            for text in (options.prompt_tokens, options.output_tokens)
        )
    except ValueError as error:
        raise ConfigError(
            f"--rate, --prompt-tokens, --output-tokens are numbers: {error}"
        ) from None
    lengths = list(itertools.product(prompts, outputs))
    if options.lengths is not None:
        lengths = lengths_of(read_load(options.lengths))
    if not lengths or min(map(min, lengths)) < 1:
        raise ConfigError("prompts and outputs have at least one token")
    loads = {}
    for rate in rates:
        each = with_popularity(dict.fromkeys(models, rate / len(models)), options.zipf)
        if options.arrivals == "poisson":
            loads[rate] = poisson_of(each, options.horizon_s, lengths, options.seed)
        else:
            cv = options.cv if options.arrivals == "bursts" else 0.0
            loads[rate] = renewal_of(each, options.horizon_s, lengths, cv, options.seed)
        if not loads[rate]:
            raise ConfigError(f"no request comes at {rate:g}/s within --horizon-s; raise either")
    return loads
