"""What the serving benchmark reports of a run, and its rows."""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aegaeon.metrics import (
    Served,
    Summary,
    Target,
    attainment,
    goodput,
    keeps,
    summarize,
    time_to_first_token_s,
    times_between_tokens_s,
)
from aegaeon.sim.workloads import Load
from benchmark.open_loop import Punctuality
from benchmark.report_rows import Aim, Row, measured
from benchmark.stream_client import Exchange

LATE_MS = 10.0
# Our servers' own figures at the end of an answer: what it waited for.
WAITS = {"queue_ms": "ms", "switch_ms": "ms", "preempted_ms": "ms", "switches": ""}


@dataclass(frozen=True)
class Run:
    """One load at one server. `switches` is None where it does not tell."""

    who: str
    rate: float
    horizon_s: float
    served: tuple[Served, ...]
    errors: Counter[str]
    waits: dict[str, tuple[float, ...]]
    prompt_tokens: int
    switches: int | None
    punctuality: Punctuality


def served_of(load: Load, exchanges: Sequence[Exchange]) -> tuple[Served, ...]:
    """Return what became of each request of `load`, sent as the exchange at its place. An answer
    may be shorter than asked for where the server ended it properly."""
    return tuple(
        Served(
            one.model,
            exchange.due_s,
            tuple(exchange.token_times_s),
            min(one.output_tokens, max(1, len(exchange.token_times_s))),
            is_failed=exchange.error is not None,
        )
        for one, exchange in zip(load, exchanges, strict=True)
    )


def waits_of(exchanges: Sequence[Exchange]) -> dict[str, tuple[float, ...]]:
    """Return what answers say that they waited for, by kind."""
    found: dict[str, list[float]] = {}
    for exchange in exchanges:
        for kind in WAITS:
            value = exchange.figures.get(kind)
            if isinstance(value, int | float):
                found.setdefault(kind, []).append(float(value))
    return {kind: tuple(values) for kind, values in found.items()}


def rows_of(runs: Sequence[Run], peers: Sequence[Sequence[Run]], target: Target) -> list[Row]:
    """Return the rows of `runs`, one for each rate and round, beside those of each peer."""
    rows: list[Row] = []
    rates = list(dict.fromkeys(run.rate for run in runs))
    for rate in rates:
        mine = [run for run in runs if run.rate == rate]
        for peer in peers or [()]:
            rows += _shared_rows(mine, [run for run in peer if run.rate == rate], target)
        rows += _own_rows(mine, target)
    if len(rates) > 1:
        rows += [_goodput_row(runs, peer, target) for peer in peers or [()]]
    return rows


def _shared_rows(mine: Sequence[Run], theirs: Sequence[Run], target: Target) -> list[Row]:
    where = f"{mine[0].rate:.3g} requests/s"

    def row(
        what: str,
        unit: str,
        figure: Callable[[Sequence[Run]], float | None],
        *,
        is_less: bool = False,
        aim: Aim | None = None,
    ) -> Row:
        ours = figure(mine)
        full = Row(
            case=f"{what}, {where}",
            unit=unit,
            ours=0.0 if ours is None else ours,
            peer=theirs[0].who if theirs else None,
            peer_value=figure(theirs) if theirs else None,
        )
        return measured(full, aim if theirs else None, is_less)

    better = Aim("ratio_to_peer", 1.0, ">= peer")
    rows = [
        row("goodput", "requests/s", lambda runs: _kept_per_s(runs, target), aim=better),
        row("attainment by request", "", lambda runs: _attainment(runs, target, "request")),
        row("attainment by token", "", lambda runs: _attainment(runs, target, "token")),
        row("tokens", "tokens/s", _tokens_per_s),
        row("failed", "requests", _failed, is_less=True),
    ]
    for percent in ("p50", "p90", "p99"):
        aim = better if percent == "p90" else None
        rows.append(row(f"TTFT {percent}", "s", _ttft(percent), is_less=True, aim=aim))
    for percent in ("p50", "p90", "p99"):
        rows.append(row(f"TBT {percent}", "ms", _tbt(percent), is_less=True))
    if mine[0].switches is not None:
        rows.append(row("switches", "", _switches, is_less=True))
    return rows


def _own_rows(runs: Sequence[Run], target: Target) -> list[Row]:
    where = f"{runs[0].rate:.3g} requests/s"
    rows = []
    errors = sum((run.errors for run in runs), Counter[str]())
    for error, count in errors.most_common():
        rows.append(Row(case=f"failed: {error}, {where}", unit="requests", ours=count))
    for kind, unit in WAITS.items():
        values = [value for run in runs for value in run.waits.get(kind, ())]
        if values:
            mean = statistics.fmean(values)
            rows.append(
                Row(case=f"waited, {kind.removesuffix('_ms')}, {where}", unit=unit, ours=mean)
            )
    served = _served(runs)
    for model in sorted({one.model for one in served}):
        own = [one for one in served if one.model == model]
        rows.append(Row(case=f"TTFT p50, {model}, {where}", unit="s", ours=_ttfts(own).p50 or 0.0))
        tbt_ms = 1e3 * (_tbts(own).p50 or 0.0)
        rows.append(Row(case=f"TBT p50, {model}, {where}", unit="ms", ours=tbt_ms))
        share = attainment(own, target).request
        rows.append(Row(case=f"attainment by request, {model}, {where}", unit="", ours=share))
    return rows + _generator_rows(runs, where)


def _generator_rows(runs: Sequence[Run], where: str) -> list[Row]:
    late = Aim("ours", LATE_MS, f"<= {LATE_MS:g} ms", is_least=False)
    send = max(run.punctuality.send_p99_s for run in runs)
    loop = max(run.punctuality.loop_p99_s for run in runs)
    ceiling = min(run.punctuality.ceiling_tokens_per_s for run in runs)
    requests = sum(len(run.served) for run in runs)
    prompts = sum(run.prompt_tokens for run in runs) / max(1, requests)
    return [
        measured(Row(case=f"generator late by p99, {where}", unit="ms", ours=1e3 * send), late),
        measured(Row(case=f"its stamps late by p99, {where}", unit="ms", ours=1e3 * loop), late),
        Row(case=f"its ceiling, {where}", unit="tokens/s", ours=ceiling),
        Row(case=f"prompts, as counted by the server, {where}", unit="tokens", ours=prompts),
    ]


def _goodput_row(runs: Sequence[Run], peers: Sequence[Run], target: Target) -> Row:
    def best(of: Sequence[Run]) -> float:
        rates = dict.fromkeys(run.rate for run in of)
        points = (
            (r, _attainment([x for x in of if x.rate == r], target, "request")) for r in rates
        )
        return goodput(points) or 0.0

    row = Row(
        case="highest rate that 90 % are kept at",
        unit="requests/s",
        ours=best(runs),
        peer=peers[0].who if peers else None,
        peer_value=best(peers) if peers else None,
    )
    return measured(row, Aim("ratio_to_peer", 1.0, ">= peer") if peers else None)


def _served(runs: Sequence[Run]) -> list[Served]:
    return [one for run in runs for one in run.served]


def _kept_per_s(runs: Sequence[Run], target: Target) -> float:
    kept = sum(keeps(one, target) for one in _served(runs))
    return kept / sum(run.horizon_s for run in runs)


def _attainment(runs: Sequence[Run], target: Target, kind: str) -> float:
    return float(getattr(attainment(_served(runs), target), kind))


def _tokens_per_s(runs: Sequence[Run]) -> float:
    """Of the time from the first request until the last token."""
    spans_s = (
        max((one.token_times_s[-1] for one in run.served if one.token_times_s), default=0.0)
        - min(one.arrival_s for one in run.served)
        for run in runs
    )
    tokens = sum(len(one.token_times_s) for one in _served(runs))
    return tokens / max(sum(max(0.0, span) for span in spans_s), 1e-9)


def _failed(runs: Sequence[Run]) -> float:
    return float(sum(run.errors.total() for run in runs))


def _switches(runs: Sequence[Run]) -> float | None:
    known = [run.switches for run in runs if run.switches is not None]
    return float(sum(known)) if known else None


def _ttfts(served: Sequence[Served]) -> Summary:
    times = (time_to_first_token_s(one.arrival_s, one.token_times_s) for one in served)
    return summarize(one for one in times if one is not None)


def _tbts(served: Sequence[Served]) -> Summary:
    return summarize(gap for one in served for gap in times_between_tokens_s(one.token_times_s))


def _ttft(percent: str) -> Callable[[Sequence[Run]], float | None]:
    return lambda runs: getattr(_ttfts(_served(runs)), percent)


def _tbt(percent: str) -> Callable[[Sequence[Run]], float | None]:
    def figure(runs: Sequence[Run]) -> float | None:
        value = getattr(_tbts(_served(runs)), percent)
        return None if value is None else 1e3 * value

    return figure
