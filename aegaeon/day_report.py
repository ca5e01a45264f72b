"""What a planned day comes to, and how people read it."""

from collections.abc import Iterator

import msgspec
from rich.table import Table

from aegaeon.metrics import Target


class Hour(msgspec.Struct, frozen=True):
    """An hour of the day; `attainment_request` is None where no sample fell into it."""

    hour: int
    requests_per_s: float
    attainment_request: float | None
    samples: int


class LossReport(msgspec.Struct, frozen=True, kw_only=True):
    """Nodes lost in the day, and the `moves` of models and gigabytes over wires that this caused.
    Of `samples` of them: the `requests` for the lost node's models from 20 s before to 40 s after,
    how many of them kept the promise, those `resumed` elsewhere, and after how long at most a model
    was there."""

    losses: int
    moves: int
    moved_gb: float
    samples: int
    requests: int
    resumed: int
    attainment_request: float | None
    longest_s: float | None


class DayReport(msgspec.Struct, frozen=True, kw_only=True):
    """A day. `requests` are all, `attainment_request` of them kept the promise, give or take the
    standard `error`, by `samples` of a minute of a node each; where nodes are lost stands in
    `losses`. `replicas` are those of all models in the last hour, `left` models had no room then,
    `moves` changed where models live from hour to hour. `device_time_share` is the mean over the
    nodes where requests come, each weighed by them."""

    policy: str
    devices: int
    nodes: int
    models: int
    target: Target
    hours: int
    requests: float
    attainment_request: float
    error: float
    samples: int
    simulated_requests: int
    simulated_tokens: int
    device_time_share: float
    replicas: int
    left: int
    moves: int
    placements: int
    placement_s: float
    by_hour: tuple[Hour, ...]
    losses: LossReport | None
    wall_s: float


class Tried(msgspec.Struct, frozen=True):
    """A number of devices, and what it kept."""

    devices: int
    attainment_request: float
    error: float


class CurvePoint(msgspec.Struct, frozen=True, kw_only=True):
    """What a load needs; `devices` is None where the most that may be are not enough."""

    policy: str
    load: float
    requests_per_s: float
    devices: int | None
    attainment_request: float
    error: float
    tried: tuple[Tried, ...]


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """Devices needed against load."""

    models: int
    target: Target
    least_attainment: float
    points: tuple[CurvePoint, ...]
    wall_s: float

    def lines(self) -> dict[str, list[tuple[float, int | None]]]:
        """Return requests a second and devices, by policy."""
        found: dict[str, list[tuple[float, int | None]]] = {}
        for one in self.points:
            found.setdefault(one.policy, []).append((one.requests_per_s, one.devices))
        return found


def render_day(report: DayReport) -> Iterator[Table | str]:
    """Yield what a person reads of `report`, in order."""
    yield (
        f"{report.policy} on {report.devices:,} devices of {report.nodes:,} nodes: "
        f"{report.requests:,.0f} requests for {report.models:,} models in {report.hours} h; "
        f"{_promise(report.target)}"
    )
    yield (
        f"kept: {_share(report.attainment_request, report.error)} of the requests, by "
        f"{report.samples} samples with {report.simulated_requests:,} requests and "
        f"{report.simulated_tokens:,} tokens"
    )
    yield f"devices compute {100 * report.device_time_share:.0f} % of the time where requests come"
    yield (
        f"placed {report.placements} times in {report.placement_s:.1f} s: {report.replicas:,} "
        f"replicas, {report.moves:,} moves from hour to hour, {report.left:,} models without room"
    )
    if report.losses is not None:
        yield _loss_line(report.losses)
    yield ""
    yield _hours_table(report)
    yield f"\nSimulated in {report.wall_s:.1f} s."


def _loss_line(losses: LossReport) -> str:
    line = (
        f"{losses.losses} nodes lost: {losses.moves:,} models moved, {losses.moved_gb:,.0f} GB "
        "over wires"
    )
    if losses.attainment_request is None or losses.longest_s is None:
        return line
    return (
        f"{line}; of {losses.samples} of them {losses.resumed:,} requests resumed, "
        f"{100 * losses.attainment_request:.1f} % of the {losses.requests:,} requests nearby kept, "
        f"models were elsewhere after {losses.longest_s:.1f} s at most"
    )


def _hours_table(report: DayReport) -> Table:
    table = Table("hour", "requests/s", "kept", "samples", box=None, pad_edge=False)
    for one in report.by_hour:
        share = one.attainment_request
        kept = "" if share is None else f"{100 * share:.1f} %"
        table.add_row(str(one.hour), f"{one.requests_per_s:,.1f}", kept, str(one.samples))
    return table


def render_curve(curve: Curve) -> Iterator[Table | str]:
    """Yield what a person reads of `curve`, in order."""
    yield (
        f"Devices that keep {100 * curve.least_attainment:g} % of the requests for "
        f"{curve.models:,} models; {_promise(curve.target)}"
    )
    table = Table("policy", "requests/s", "devices", "kept", "tried", box=None, pad_edge=False)
    for one in curve.points:
        most = max(tried.devices for tried in one.tried)
        tried = ", ".join(f"{t.devices}: {100 * t.attainment_request:.0f} %" for t in one.tried)
        table.add_row(
            one.policy,
            f"{one.requests_per_s:,.1f}",
            f"more than {most:,}" if one.devices is None else f"{one.devices:,}",
            _share(one.attainment_request, one.error),
            tried,
        )
    yield table
    yield f"\nSimulated in {curve.wall_s:.1f} s."


def _promise(target: Target) -> str:
    return f"promised {target.ttft_s:g} s to the first token and {target.tbt_s:g} s between tokens"


def _share(share: float, error: float) -> str:
    return f"{100 * share:.1f} % ± {100 * error:.1f}"
