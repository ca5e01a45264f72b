"""The one shape of benchmark results: rows, the machine they were measured on, table and JSON."""

import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
from rich.console import Console
from rich.table import Table


class Aim(msgspec.Struct, frozen=True):
    """What a row should reach: `of` compares with `bound`, in the direction `is_least` says."""

    of: Literal["ours", "ratio_to_peer", "ratio_to_limit"]
    bound: float
    text: str
    is_least: bool = True


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One measured case. Ratios are such that more is better; None where nothing applies."""

    case: str
    unit: str
    ours: float
    peer: str | None = None
    peer_value: float | None = None
    limit: float | None = None
    ratio_to_peer: float | None = None
    ratio_to_limit: float | None = None
    aim: str | None = None
    met: bool | None = None


class Machine(msgspec.Struct, frozen=True):
    """What the figures depend on."""

    cpu: str
    processors: int
    memory_gb: float
    system: str
    python: str


class Report(msgspec.Struct, frozen=True):
    """All of a benchmark's output; `skipped` says what was not measured, and why."""

    machine: Machine
    rows: tuple[Row, ...]
    skipped: tuple[str, ...] = ()


def measured(row: Row, aim: Aim | None = None, less_is_better: bool = False) -> Row:
    """Return `row` with its ratios, and whether it reaches `aim`."""

    def ratio(other: float | None) -> float | None:
        if not other or not row.ours:
            return None
        return other / row.ours if less_is_better else row.ours / other

    full = msgspec.structs.replace(
        row, ratio_to_peer=ratio(row.peer_value), ratio_to_limit=ratio(row.limit)
    )
    if aim is None:
        return full
    value: float | None = getattr(full, aim.of)
    met = None if value is None else (value >= aim.bound) == aim.is_least or value == aim.bound
    return msgspec.structs.replace(full, aim=aim.text, met=met)


def this_machine() -> Machine:
    """Describe the machine we run on."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Machine(
        cpu=_cpu_name(),
        processors=len(os.sched_getaffinity(0)),
        memory_gb=round(pages / 1e9, 1),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
    )


def publish(title: str, rows: Sequence[Row], as_json: bool, skipped: Sequence[str] = ()) -> None:
    """Print `rows` on stdout: one JSON object, or a table for people."""
    machine = this_machine()
    if as_json:
        print(msgspec.json.encode(Report(machine, tuple(rows), tuple(skipped))).decode())
        return
    table = Table(title=title, caption=f"{machine.cpu}, {machine.processors} processors")
    for heading in (
        "case",
        "ours",
        "unit",
        "peer",
        "peer's",
        "x peer",
        "limit",
        "x limit",
        "aim",
        "met",
    ):
        table.add_column(heading, justify="left" if heading in {"case", "peer"} else "right")
    for row in rows:
        met = "" if row.met is None else ("yes" if row.met else "NO")
        table.add_row(
            *(row.case, _shown(row.ours), row.unit, row.peer or "", _shown(row.peer_value)),
            *(_shown(row.ratio_to_peer), _shown(row.limit), _shown(row.ratio_to_limit)),
            *(row.aim or "", met),
        )
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for text in skipped:
        console.print(f"skipped: {text}", markup=False)


def progress(text: str) -> None:
    """Say on stderr what is being measured."""
    print(text, file=sys.stderr, flush=True)


def _shown(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
