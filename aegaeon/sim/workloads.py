"""Loads to simulate: read from published files, generated, and laid over each other."""

import csv
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

import msgspec

from aegaeon.errors import ConfigError
from aegaeon.scheduler.cost import Costs, ModelCost
from aegaeon.types import ModelId

# All are column names of a header line.
PAPER_COLUMNS = ("Request Time", "Model Name", "Input Length", "Output Length")
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURST_COLUMNS = ("Timestamp", "Model", "Request tokens", "Response tokens")
LONGEST_OVERFLOW = 16384  # of the published rule that shortens what is too long
OVERFLOW_MARGIN = 32


class Arrival(msgspec.Struct, frozen=True, order=True):
    """A request: `at_s` from the load's start, and its lengths in tokens, both at least 1; `key` is
    whose it is."""

    at_s: float
    model: ModelId
    prompt_tokens: int
    output_tokens: int
    key: str = ""


Load = tuple[Arrival, ...]  # ordered by time
Number = TypeVar("Number", int, float)


def read_load(path: Path, horizon_s: float = math.inf) -> Load:
    """Return what the CSV file at `path` asks for before `horizon_s`.

    The columns are those of the artifact of Aegaeon (SOSP'25), those of Azure's traces of 2023 and
    2024, which name no model: all is asked of one, named like the file; or those of BurstGPT, whose
    failed requests, without an output, are left out. Raises ConfigError.
    """
    return tuple(sorted(one for one in read_arrivals(path) if one.at_s < horizon_s))


def read_arrivals(path: Path) -> Iterator[Arrival]:
    """Yield what `read_load` returns, in the order of the file, without keeping it. Raises
    ConfigError."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            columns = tuple(rows.fieldnames or ())
            if set(PAPER_COLUMNS) <= set(columns):
                yield from _paper_rows(rows)
            elif set(AZURE_COLUMNS) <= set(columns):
                yield from _azure_rows(rows, path.stem)
            elif set(BURST_COLUMNS) <= set(columns):
                yield from _burst_rows(rows)
            else:
                raise ConfigError(
                    f"{path} has the columns {', '.join(columns) or 'of no header'}; a load has "
                    f"{', '.join(PAPER_COLUMNS)}, or {', '.join(AZURE_COLUMNS)}, or "
                    f"{', '.join(BURST_COLUMNS)}"
                )
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} is no CSV file: {error}") from None


def apart(loads: Sequence[Load]) -> tuple[Load, ...]:
    """Return `loads` with models of their own: from the second on they are named anew."""
    return tuple(
        tuple(msgspec.structs.replace(one, model=f"x{index}_{one.model}") for one in load)
        if index
        else load
        for index, load in enumerate(loads)
    )


def superpose(
    loads: Sequence[Load], shift_s: float = 37.0, horizon_s: float = 120.0, tile: int = 1
) -> Load:
    """Return all `loads` at once, and the whole again `tile` times, every `horizon_s`.

    Load j, from 0, begins j * `shift_s` later; what thereby leaves the horizon comes at its
    beginning. Raises ConfigError.
    """
    if not 0 < horizon_s < math.inf or not 0 <= shift_s < math.inf or tile < 1:
        raise ConfigError("--horizon must be above 0 s, --shift 0 s or more, --tile at least 1")
    together = [
        msgspec.structs.replace(one, at_s=(one.at_s + index * shift_s) % horizon_s)
        if index
        else one
        for index, load in enumerate(loads)
        for one in load
    ]
    turns = itertools.product(range(tile), together)
    moved = (msgspec.structs.replace(one, at_s=one.at_s + n * horizon_s) for n, one in turns)
    return tuple(sorted(moved))


def models_of(load: Iterable[Arrival]) -> tuple[ModelId, ...]:
    """Return the models of a load, each once, in the order in which they first appear."""
    return tuple(dict.fromkeys(one.model for one in load))


def fit_lengths(load: Load, costs: dict[ModelId, ModelCost]) -> Load:
    """Return `load` with requests that are too long for their model shortened as the artifact of
    Aegaeon does: both lengths in proportion."""
    return tuple(fit_length(one, costs[one.model].max_len) for one in load)


def fit_length(one: Arrival, max_len: int) -> Arrival:
    """Return `one`, shortened if it is longer than `max_len`."""
    total = one.prompt_tokens + one.output_tokens
    if total <= max_len:
        return one
    scale = max_len / max(total + OVERFLOW_MARGIN, LONGEST_OVERFLOW)
    prompt, output = (max(1, int(n * scale)) for n in (one.prompt_tokens, one.output_tokens))
    return msgspec.structs.replace(one, prompt_tokens=prompt, output_tokens=output)


def prepare(
    loads: Sequence[Load], costs: Costs, shift_s: float, horizon_s: float, tile: int
) -> tuple[Load, dict[ModelId, ModelCost]]:
    """Return `loads` laid over each other, and what their models cost; each load has the whole mix
    of kinds, and lengths that its models can take."""
    kinds: dict[ModelId, ModelCost] = {}
    fitted = []
    for load in apart(loads):
        kinds |= costs.of(models_of(load))
        fitted.append(fit_lengths(load, kinds))
    return superpose(fitted, shift_s, horizon_s, tile), kinds


def poisson(
    models: int,
    rate_per_model: float,
    horizon_s: float,
    lengths: Sequence[tuple[int, int]],
    *,
    zipf: float = 0.0,
    seed: int = 0,
) -> Load:
    """Return requests that come independently of each other, with (prompt, output) `lengths` drawn
    from those given. `zipf` is the exponent of the models' popularity, 0 for all alike; the mean
    rate of a model is `rate_per_model` requests per second. Raises ConfigError."""
    if models < 1 or not rate_per_model > 0 or not 0 < horizon_s < math.inf or not lengths:
        raise ConfigError("a load needs models, a rate and a horizon above 0, and some lengths")
    weights = [1 / rank**zipf for rank in range(1, models + 1)]
    scale = models * rate_per_model / math.fsum(weights)
    rates = {f"model-{n:04d}": scale * weight for n, weight in enumerate(weights)}
    return poisson_of(rates, horizon_s, lengths, seed)


def poisson_of(
    rates: Mapping[ModelId, float],
    horizon_s: float,
    lengths: Sequence[tuple[int, int]],
    seed: int = 0,
) -> Load:
    """As `poisson`, with the rate of each model, in requests per second. Raises ConfigError."""
    rate = math.fsum(rates.values())
    if not 0 < rate < math.inf or min(rates.values()) < 0 or not lengths:
        raise ConfigError("a load needs rates of 0 or more, one of them above 0, and some lengths")
    draw = random.Random(seed)
    weights = list(itertools.accumulate(rates.values()))
    names = tuple(rates)
    arrivals = []
    at_s = draw.expovariate(rate)
    while at_s < horizon_s:
        model = draw.choices(names, cum_weights=weights)[0]
        arrivals.append(Arrival(at_s, model, *draw.choice(lengths)))
        at_s += draw.expovariate(rate)
    return tuple(arrivals)


def lengths_of(load: Iterable[Arrival]) -> list[tuple[int, int]]:
    """Return the lengths of a load's prompts and outputs, in tokens, to draw from."""
    return [(one.prompt_tokens, one.output_tokens) for one in load]


def burst(load: Load, at_s: float, length_s: float, factor: int) -> Load:
    """Return `load` with `factor` times as many requests in the `length_s` seconds from `at_s` on:
    each of them again, at the same time."""
    return tuple(
        one for one in load for _ in range(factor if at_s <= one.at_s < at_s + length_s else 1)
    )


def _paper_rows(rows: "csv.DictReader[str]") -> Iterator[Arrival]:
    for row in rows:
        at_s = _number(rows, row, "Request Time", _clock_s)
        prompt, output = (max(1, _number(rows, row, name, int)) for name in PAPER_COLUMNS[2:])
        yield Arrival(at_s, row["Model Name"], prompt, output)


def _azure_rows(rows: "csv.DictReader[str]", model: ModelId) -> Iterator[Arrival]:
    began_s: float | None = None
    for row in rows:
        at_s = _number(rows, row, "TIMESTAMP", _date_s)
        began_s = at_s if began_s is None else began_s
        prompt, output = (max(1, _number(rows, row, name, int)) for name in AZURE_COLUMNS[1:])
        yield Arrival(at_s - began_s, model, prompt, output)


def _burst_rows(rows: "csv.DictReader[str]") -> Iterator[Arrival]:
    began_s: float | None = None
    for row in rows:
        at_s = _number(rows, row, "Timestamp", float)
        began_s = at_s if began_s is None else began_s
        prompt, output = (_number(rows, row, name, int) for name in BURST_COLUMNS[2:])
        if output:
            yield Arrival(max(0.0, at_s - began_s), row["Model"], max(1, prompt), output)


def _number(
    rows: "csv.DictReader[str]", row: dict[str, str], column: str, convert: Callable[[str], Number]
) -> Number:
    try:
        number = convert(row[column])
        if 0 <= number < math.inf:
            return number
    except (TypeError, ValueError):
        pass
    raise ConfigError(f"line {rows.line_num}: {column} is {row[column]!r}, which is no {column}")


def _clock_s(text: str) -> float:
    hours, minutes, seconds = text.split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def _date_s(text: str) -> float:
    # Azure writes seven digits of a second, where six are the most, and later the zone, UTC.
    whole, _, fraction = text.strip().removesuffix("+00:00").partition(".")
    began = datetime.fromisoformat(whole).replace(tzinfo=timezone.utc)
    return began.timestamp() + float(f"0.{fraction or 0}")
