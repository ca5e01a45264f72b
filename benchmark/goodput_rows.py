"""Rows of the goodput benchmark."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aegaeon.metrics import (
    Attainment,
    Served,
    summarize,
    time_to_first_token_s,
    times_between_tokens_s,
)
from benchmark.report_rows import Aim, Row, measured

# Whom each policy should at least equal: the best of these.
RIVALS = {"slack": ("paper", "paper-split"), "paper": ("request",)}


@dataclass(frozen=True)
class Point:
    """A policy at a rate: medians over the rounds, and all requests of them.

    What is `predicted` has steps as slow as they were beside server and client; `predicted_alone`
    as they were calibrated, when nothing else ran.
    """

    policy: str
    rate: float
    reached: Attainment
    predicted: float
    predicted_alone: float
    served: tuple[Served, ...]
    switches: int
    switch_share: float
    stall_share: float
    slowness: float


def rows_of(
    points: Sequence[Point],
    goodputs: Mapping[str, tuple[float | None, float | None]],
) -> list[Row]:
    """Return what is printed: goodputs, then each point with its shares, then TTFT and TBT."""
    rows = [_goodput_row(policy, goodputs) for policy in goodputs]
    for point in points:
        rows += _point_rows(point)
    for point in points:
        rows += _model_rows(point)
    return rows


def _goodput_row(policy: str, goodputs: Mapping[str, tuple[float | None, float | None]]) -> Row:
    ours, predicted = goodputs[policy]
    rivals = {name: goodputs[name][0] or 0.0 for name in RIVALS.get(policy, ()) if name in goodputs}
    rival = max(rivals, key=rivals.__getitem__, default=None)
    peer = None if rival is None else rivals[rival]
    row = Row(
        case=f"goodput, {policy} (simulated {predicted or 0:.2f})",
        unit="requests/s",
        ours=ours or 0.0,
        peer=rival if peer is not None else None,
        peer_value=peer,
    )
    return measured(row, Aim("ratio_to_peer", 1.0, f">= {rival}") if peer is not None else None)


def _point_rows(point: Point) -> list[Row]:
    where = f"{point.policy}, {point.rate:g} requests/s"
    gap = abs(point.predicted - point.reached.request)
    aim = Aim("ours", 0.15, "within 0.15", is_least=False)
    return [
        Row(case=f"attainment by request, {where}", unit="", ours=point.reached.request),
        Row(case=f"attainment by time, {where}", unit="", ours=point.reached.time),
        Row(case=f"attainment by token, {where}", unit="", ours=point.reached.token),
        measured(Row(case=f"simulated and measured differ by, {where}", unit="", ours=gap), aim),
        Row(case=f"simulated as calibrated, {where}", unit="", ours=point.predicted_alone),
        Row(case=f"steps take, of what is calibrated, {where}", unit="x", ours=point.slowness),
        Row(case=f"switches, {where}", unit="", ours=point.switches),
        Row(case=f"time lost to switches, {where}", unit="%", ours=100 * point.switch_share),
        Row(case=f"time lost waiting for loads, {where}", unit="%", ours=100 * point.stall_share),
    ]


def _model_rows(point: Point) -> list[Row]:
    rows = []
    for model in sorted({one.model for one in point.served}):
        mine = [one for one in point.served if one.model == model and one.token_times_s]
        ttft = summarize(
            time_to_first_token_s(one.arrival_s, one.token_times_s) or 0.0 for one in mine
        )
        tbt = summarize(gap for one in mine for gap in times_between_tokens_s(one.token_times_s))
        where = f"{model}, {point.policy}, {point.rate:g} requests/s"
        rows.append(Row(case=f"TTFT p50, {where}", unit="s", ours=ttft.p50 or 0.0))
        rows.append(Row(case=f"TBT p50, {where}", unit="ms", ours=1000 * (tbt.p50 or 0.0)))
    return rows
