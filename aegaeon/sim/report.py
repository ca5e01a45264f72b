"""What a simulated run comes to: totals and figures per model, and how people read them."""

import math
from collections.abc import Iterable, Iterator, Sequence

import msgspec
from rich.markup import escape
from rich.table import Table

from aegaeon.metrics import (
    Attainment,
    Served,
    Summary,
    Target,
    attainment,
    fairness,
    summarize,
    switch_time_share,
    time_to_first_token_s,
)
from aegaeon.sim.cluster import Simulated
from aegaeon.types import ModelId

SHOWN_MODELS = 12  # in the table for people; JSON has all


class ModelReport(msgspec.Struct, frozen=True, kw_only=True):
    """A model's requests. TTFT is None where no request got a token."""

    model: ModelId
    requests: int
    failed: int
    tokens: int
    attainment_time: float
    attainment_token: float
    attainment_request: float
    ttft_p50_s: float | None
    ttft_p99_s: float | None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A run. `tokens` are those made; `tbt_s` summarises each request's mean time between tokens.

    Of the devices' time, from the first request to the last token: `device_time_share` computed,
    `switch_time_share` switched, `stall_time_share` did neither though there were requests, and
    `link_time_share` moved weights or KV, beside computing or not. `fairness` is Jain's index over
    the models' `attainment_request`. `wall_s` is what the run itself took, metrics included.
    """

    policy: str
    devices: int
    target: Target
    models: int
    requests: int
    failed: int
    tokens: int
    attainment_time: float
    attainment_token: float
    attainment_request: float
    switches: int
    loads: int
    kv_moved_gb: float
    switch_time_share: float
    device_time_share: float
    stall_time_share: float
    link_time_share: float
    fairness: float
    ttft_s: Summary
    tbt_s: Summary
    simulated_s: float
    wall_s: float
    per_model: tuple[ModelReport, ...]


def make_report(run: Simulated, policy: str, target: Target) -> Report:
    """Return what `run` under `policy` comes to for `target`; `wall_s` is left 0."""
    groups: dict[ModelId, list[Served]] = {}
    for one in run.served:
        groups.setdefault(one.model, []).append(one)
    kept = {model: attainment(group, target) for model, group in groups.items()}
    total = _together(groups, kept)
    usage, devices = run.usage, len(run.usage)
    per_model = tuple(_model_report(model, groups[model], kept[model]) for model in sorted(groups))

    def share(seconds: Iterable[float]) -> float:
        return switch_time_share(math.fsum(seconds), devices, run.ended_s)

    return Report(
        policy=policy,
        devices=devices,
        target=target,
        models=len(groups),
        requests=len(run.served),
        failed=sum(one.failed for one in per_model),
        tokens=sum(one.tokens for one in per_model),
        attainment_time=total.time,
        attainment_token=total.token,
        attainment_request=total.request,
        switches=sum(one.switches for one in usage),
        loads=sum(one.loads for one in usage),
        kv_moved_gb=math.fsum(one.kv_moved_gb for one in usage),
        switch_time_share=share(one.switch_s for one in usage),
        device_time_share=share(one.compute_s for one in usage),
        stall_time_share=share(one.stall_s for one in usage),
        link_time_share=share(one.link_s for one in usage),
        fairness=fairness(one.request for one in kept.values()),
        ttft_s=summarize(_ttft_s(run.served)),
        tbt_s=summarize(_mean_tbt_s(run.served)),
        simulated_s=run.ended_s,
        wall_s=0.0,
        per_model=per_model,
    )


def _together(groups: dict[ModelId, list[Served]], kept: dict[ModelId, Attainment]) -> Attainment:
    """The attainment of all from that of each model, which would cost as much to count again."""
    requests = sum(map(len, groups.values()))
    if not requests:
        return Attainment(1.0, 1.0, 1.0)
    wanted = {m: sum(max(one.wanted_tokens, 1) for one in group) for m, group in groups.items()}
    return Attainment(
        time=math.fsum(kept[m].time * len(group) for m, group in groups.items()) / requests,
        token=math.fsum(kept[m].token * wanted[m] for m in groups) / sum(wanted.values()),
        request=math.fsum(kept[m].request * len(group) for m, group in groups.items()) / requests,
    )


def _model_report(model: ModelId, group: Sequence[Served], kept: Attainment) -> ModelReport:
    ttft_s = summarize(_ttft_s(group))
    return ModelReport(
        model=model,
        requests=len(group),
        failed=sum(not one.is_complete for one in group),
        tokens=sum(len(one.token_times_s) for one in group),
        attainment_time=kept.time,
        attainment_token=kept.token,
        attainment_request=kept.request,
        ttft_p50_s=ttft_s.p50,
        ttft_p99_s=ttft_s.p99,
    )


def _ttft_s(served: Iterable[Served]) -> Iterator[float]:
    for one in served:
        first_s = time_to_first_token_s(one.arrival_s, one.token_times_s)
        if first_s is not None:
            yield first_s


def _mean_tbt_s(served: Iterable[Served]) -> Iterator[float]:
    for one in served:
        times = one.token_times_s
        if len(times) > 1:
            yield (times[-1] - times[0]) / (len(times) - 1)


def render(report: Report) -> Iterator[Table | str]:
    """Yield what a person reads of `report`, in order."""
    target = report.target
    yield (
        f"{report.policy} on {report.devices} devices: {report.requests} requests for "
        f"{report.models} models, {report.tokens} tokens in {report.simulated_s:.1f} s; promised "
        f"{target.ttft_s:g} s to the first token and {target.tbt_s:g} s between tokens"
    )
    yield ""
    yield _totals_table(report)
    yield ""
    yield _models_table(report)
    left = report.models - SHOWN_MODELS
    if left > 0:
        yield f"{left} models that fared no worse are left out; --json has all."
    yield f"Simulated in {report.wall_s:.2f} s."


def _totals_table(report: Report) -> Table:
    table = Table("what", "", "what it means", box=None, pad_edge=False)
    for name, value, meaning in (
        ("attainment_request", _percent(report.attainment_request), "requests that kept both"),
        ("attainment_token", _percent(report.attainment_token), "tokens made by their due time"),
        ("attainment_time", _percent(report.attainment_time), "time within deadlines, lenient"),
        ("fairness", f"{report.fairness:.3f}", "over models; 1: all fared alike"),
        ("failed", str(report.failed), "requests dropped or broken off"),
        ("TTFT p50 / p99", _pair(report.ttft_s), "to the first token"),
        ("TBT p50 / p99", _pair(report.tbt_s), "a request's mean"),
        ("computing", _percent(report.device_time_share), "of the devices' time"),
        ("switching", _percent(report.switch_time_share), f"in {report.switches} switches"),
        ("stalled", _percent(report.stall_time_share), "requests, but none could compute"),
        (
            "link busy",
            _percent(report.link_time_share),
            f"{report.loads} loads of weights, {report.kv_moved_gb:.0f} GB of KV",
        ),
    ):
        table.add_row(name, value, meaning)
    table.columns[1].justify = "right"
    return table


def _models_table(report: Report) -> Table:
    table = Table("model", box=None, pad_edge=False)
    for heading in ("requests", "failed", "tokens", "request", "token", "TTFT p50", "p99"):
        table.add_column(heading, justify="right")
    worst = sorted(report.per_model, key=lambda one: (one.attainment_request, one.model))
    for one in worst[:SHOWN_MODELS]:
        table.add_row(
            *(escape(one.model), str(one.requests), str(one.failed), str(one.tokens)),
            *(_percent(one.attainment_request), _percent(one.attainment_token)),
            *(_seconds(one.ttft_p50_s), _seconds(one.ttft_p99_s)),
        )
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _pair(summary: Summary) -> str:
    return f"{_seconds(summary.p50)} / {_seconds(summary.p99)}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.0f} ms"
