"""What the offline benchmark reports: its JSON's records, and how the figures come together."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from aegaeon.measures import PHASES, Phase, PhaseTotal
from aegaeon.metrics import Summary, summarize, times_between_tokens_s
from aegaeon.types import (
    Instance,
    InstanceId,
    InstanceStatus,
    ModelId,
)


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one request; times are seconds since the start of the run."""

    model: ModelId
    instance: InstanceId
    arrival_s: float
    ttft_s: float | None
    token_times_s: tuple[float, ...]
    prompt_tokens: int
    error: str | None = None


class Latency(msgspec.Struct, frozen=True):
    """TTFT and TBT of a set of requests, milliseconds."""

    ttft_ms: Summary
    tbt_ms: Summary


class Switching(msgspec.Struct, frozen=True):
    """One instance's share; `models_seen` is a count, `switch_rate` is switches per request,
    `phases` are copies of the run: how many, of how many bytes, and the seconds they took."""

    requests: int
    models_seen: int
    switches: int
    switch_rate: float
    phases: dict[Phase, PhaseTotal]


class Activity(msgspec.Struct, frozen=True):
    """What an instance did besides computing."""

    switches: int
    phases: dict[Phase, PhaseTotal]


class Memory(msgspec.Struct, frozen=True):
    """Bytes of the node's weight cache: the most that was seen in memory, and its bound."""

    weight_bytes_peak: int
    weight_budget_bytes: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The benchmark's JSON."""

    device: str
    machine: dict[str, Any]
    wall_time_s: float
    req_per_s: float
    token_per_s: float
    requests: int
    failed_requests: int
    generated_tokens: int
    ttft_ms: Summary
    tbt_ms: Summary
    per_model: dict[ModelId, Latency]
    instance_switching: dict[InstanceId, Switching]
    memory: Memory
    options: dict[str, Any]


def latency_of(served: Sequence[Served]) -> Latency:
    """Summarise the requests in milliseconds."""
    ttft = [1000 * one.ttft_s for one in served if one.ttft_s is not None]
    tbt = [1000 * gap for one in served for gap in times_between_tokens_s(one.token_times_s)]
    return Latency(summarize(ttft), summarize(tbt))


def activity_between(
    before: dict[InstanceId, Instance], after: Sequence[Instance]
) -> dict[InstanceId, Activity]:
    """Return what each of `after` has done since `before`; all of it where it is another one."""
    done = {}
    for row in after:
        was = before.get(row.record.id)
        is_same = was is not None and was.record.incarnation == row.record.incarnation
        start = was.status if is_same and was else InstanceStatus()
        phases = {
            phase: _difference(start.moved.get(phase), row.status.moved.get(phase))
            for phase in PHASES
        }
        done[row.record.id] = Activity(row.status.switches - start.switches, phases)
    return done


def _difference(before: PhaseTotal | None, after: PhaseTotal | None) -> PhaseTotal:
    start, end = before or PhaseTotal(), after or PhaseTotal()
    return PhaseTotal(
        end.count - start.count,
        end.moved_bytes - start.moved_bytes,
        end.seconds - start.seconds,
    )


def make_report(
    served: Sequence[Served], wall_s: float, activity: dict[InstanceId, Activity], **told: Any
) -> Report:
    """Put the figures together; `told` are the report's device, machine, memory and options."""
    by_model = {m: [one for one in served if one.model == m] for m in {o.model for o in served}}
    by_instance = {i: [one for one in served if one.instance == i] for i in activity}
    overall = latency_of(served)
    tokens = sum(len(one.token_times_s) for one in served)
    failed = sum(one.error is not None for one in served)
    return Report(
        wall_time_s=wall_s,
        req_per_s=(len(served) - failed) / wall_s,
        token_per_s=tokens / wall_s,
        requests=len(served),
        failed_requests=failed,
        generated_tokens=tokens,
        ttft_ms=overall.ttft_ms,
        tbt_ms=overall.tbt_ms,
        per_model={model: latency_of(by_model[model]) for model in sorted(by_model)},
        instance_switching={
            instance: _switching(own, activity[instance])
            for instance, own in sorted(by_instance.items())
        },
        **told,
    )


def _switching(own: Sequence[Served], activity: Activity) -> Switching:
    return Switching(
        requests=len(own),
        models_seen=len({one.model for one in own}),
        switches=activity.switches,
        switch_rate=activity.switches / len(own) if own else 0.0,
        phases=activity.phases,
    )


def describe_machine() -> dict[str, Any]:
    """Say what the figures were measured on."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    return {
        "processor": processor,
        "processors": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
