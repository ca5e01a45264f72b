"""Figures and rows of the relay benchmark: stamps of both ends brought together."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from aegaeon.metrics import percentile
from benchmark.relay_instance import Stamp
from benchmark.report_rows import Aim, Row, measured
from benchmark.serving import ServerError
from benchmark.stream_client import Exchange

P50_MS, P99_MS, TOKENS_PER_S = 1.0, 5.0, 50_000.0
SETTLE_SHARE = 0.2  # of the time in which all are open: prompts are read in it
PEER = "FastAPI"


@dataclass(frozen=True)
class Case:
    """How tokens come: `groups` of streams take turns at steps of `step_s` (0: at once)."""

    name: str
    groups: int
    step_s: float
    tokens: int  # of a stream


@dataclass(frozen=True)
class Sample:
    """At `at_s` (monotonic clock): the relaying process's processor time so far."""

    at_s: float
    processor_s: float


@dataclass(frozen=True)
class Relayed:
    """One run: delays over the time in which all streams were open, rates from when all had begun
    until the end. `frames` are those of a token."""

    p50_s: float
    p99_s: float
    tokens_per_processor_s: float
    tokens_per_s: float
    frames: float


def relayed(exchanges: Sequence[Exchange], samples: Sequence[Sample], stamps: bytes) -> Relayed:
    """Bring together what the client saw, the last sample behind the end, and the encoded stamps of
    when tokens were sent. Raises ServerError."""
    begun_s = max(one.token_times_s[0] for one in exchanges)
    first = next((one for one in samples if one.at_s > begun_s), samples[-1])
    last = samples[-1]
    times_s = [at_s for one in exchanges for at_s in one.token_times_s]
    tokens = sum(first.at_s < at_s <= last.at_s for at_s in times_s)
    if tokens <= 0:
        raise ServerError("the streams are too short to be all open for a while; raise --tokens")
    frames = sum(one.chunks for one in exchanges)
    delays = _delays_s(exchanges, stamps)
    if not delays:
        raise ServerError("some streams end before others begin; raise --tokens")
    return Relayed(
        p50_s=percentile(delays, 50),
        p99_s=percentile(delays, 99),
        tokens_per_processor_s=tokens / (last.processor_s - first.processor_s),
        tokens_per_s=tokens / (last.at_s - first.at_s),
        frames=frames / len(times_s),
    )


def _delays_s(exchanges: Sequence[Exchange], stamps: bytes) -> list[float]:
    """Return, sorted, what each token took from its stamp to the client."""
    left_s: dict[str, dict[int, float]] = {}
    for stamp in msgspec.msgpack.decode(stamps, type=list[Stamp]):
        times = left_s.setdefault(stamp.request, {})
        times |= dict.fromkeys(range(stamp.position, stamp.position + stamp.tokens), stamp.at_s)
    from_s = max(one.begun_s for one in exchanges)
    until_s = min(one.token_times_s[-1] for one in exchanges)
    from_s += SETTLE_SHARE * (until_s - from_s)
    return sorted(
        at_s - left_s[f"{one.id}.0"][position]
        for one in exchanges
        for position, at_s in enumerate(one.token_times_s)
        if from_s < at_s < until_s
    )


def rows_of(
    case: Case,
    streams: int,
    ours: Sequence[Relayed],
    peers: Sequence[Relayed],
    sends: Sequence[Relayed] = (),
) -> list[Row]:
    """Return the rows of a case, as medians over its rounds. `sends` are bare sends of the same
    bytes, one beside each of `ours`: what is aimed at is what ours takes longer."""

    def row(what: str, unit: str, field: str, aim: Aim | None = None) -> Row:
        is_time = unit == "ms"
        scale = 1000.0 if is_time else 1.0
        mine, theirs = (_median(runs, field, scale) for runs in (ours, peers))
        bare = _median(sends, field, scale) if is_time else None
        assert mine is not None
        found = Row(
            case=f"{what}, {streams} streams {case.name}",
            unit=unit,
            ours=mine,
            peer=PEER if peers else None,
            peer_value=theirs,
            limit=bare,
        )
        return measured(found, aim, less_is_better=is_time)

    is_paced = case.step_s > 0
    rate = None if is_paced else Aim("ours", TOKENS_PER_S, f">= {TOKENS_PER_S:,.0f}")
    rows = [
        row("tokens a processor second", "tokens/s", "tokens_per_processor_s", rate),
        row("tokens", "tokens/s", "tokens_per_s"),
        row("frames of a token", "", "frames"),
    ]
    if is_paced:
        delays = [row(f"from record to client, {at}", "ms", f"{at}_s") for at in ("p50", "p99")]
        rows = [*_added(case, streams, ours, sends), *delays, *rows]
    return rows


def _median(runs: Sequence[Relayed], field: str, scale: float) -> float | None:
    """Of what the runs found, if there were any."""
    if not runs:
        return None
    values: list[float] = [getattr(one, field) for one in runs]
    return scale * statistics.median(values)


def _added(
    case: Case, streams: int, ours: Sequence[Relayed], sends: Sequence[Relayed]
) -> list[Row]:
    """What ours adds to bare sends: the median of the rounds' differences. It can be nothing."""
    rows = []
    for name, field, most_ms in (("p50", "p50_s", P50_MS), ("p99", "p99_s", P99_MS)):
        added_s = statistics.median(
            getattr(one, field) - getattr(bare, field)
            for one, bare in zip(ours, sends, strict=True)
        )
        case_name = f"added to a token over bare sends, {name}, {streams} streams {case.name}"
        aim = Aim("ours", most_ms, f"< {most_ms:g} ms", is_least=False)
        rows.append(measured(Row(case=case_name, unit="ms", ours=1000.0 * added_s), aim))
    return rows
