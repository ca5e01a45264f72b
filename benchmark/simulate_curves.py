"""Curves of attainment over models, like figures 11 to 13 of Aegaeon (SOSP'25), and the sweep that
they show.
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec

from aegaeon.errors import ConfigError
from benchmark.report_rows import Row
from benchmark.simulate_cases import Bench, scaled

LEAST = 0.9
MARKERS = ("o", "s", "^", "d", "v", "x")


class Sweep(msgspec.Struct, frozen=True, kw_only=True):
    """What is tried: every policy on every load. `scales` are of the targets."""

    policies: tuple[str, ...]
    models: tuple[int, ...]
    rates: tuple[float, ...]
    scales: tuple[float, ...] = (1.0,)


class Point(msgspec.Struct, frozen=True):
    """One run of a sweep."""

    policy: str
    models: int
    rate: float
    scale: float
    attainment_request: float


def sweep(bench: Bench, asked: Sweep) -> list[Point]:
    """Run it, on generated loads with the published lengths."""
    lengths = bench.data / "paper" / "synth-80-0.1-1.0-1.0.csv"
    points = []
    for rate in asked.rates:
        for models in asked.models:
            load = bench.generated(models, rate, lengths)
            for scale in asked.scales:
                case = bench.case_of([load], scaled(scale))
                for policy in asked.policies:
                    name = f"{models} models at {rate:g}/s, targets x{scale:g}"
                    report = bench.run_case(case, policy, name)
                    points.append(Point(policy, models, rate, scale, report.attainment_request))
    return points


def rows(points: Sequence[Point]) -> list[Row]:
    """Return a row for each point."""
    return [
        Row(
            case=f"{p.policy}, {p.models} models at {p.rate:g}/s, targets x{p.scale:g}, generated: "
            "attainment_request",
            unit="share",
            ours=p.attainment_request,
        )
        for p in points
    ]


def draw(points: Sequence[Point], directory: Path) -> list[Path]:
    """Draw a panel for each rate and scale of the targets, with the 90 % line; return the files, a
    PNG and an SVG. Raises ConfigError without matplotlib."""
    pyplot = _import_pyplot()
    rates = sorted({point.rate for point in points})
    scales = sorted({point.scale for point in points}, reverse=True)
    figure, panels = pyplot.subplots(
        len(rates),
        len(scales),
        figsize=(4.2 * len(scales), 3.2 * len(rates)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for rate, line in zip(rates, panels, strict=True):
        for scale, panel in zip(scales, line, strict=True):
            _draw_panel(panel, [p for p in points if (p.rate, p.scale) == (rate, scale)])
            panel.set_title(f"{rate:g} requests/s each, targets x{scale:g}", fontsize=10)
    panels[0][0].legend(fontsize=9)
    directory.mkdir(parents=True, exist_ok=True)
    files = [directory / f"attainment.{kind}" for kind in ("png", "svg")]
    for file in files:
        figure.savefig(file, dpi=150)
    pyplot.close(figure)
    return files


def _draw_panel(panel: Any, points: Sequence[Point]) -> None:
    policies = dict.fromkeys(point.policy for point in points)
    for policy, marker in zip(policies, MARKERS, strict=False):
        ours = sorted((p.models, 100 * p.attainment_request) for p in points if p.policy == policy)
        panel.plot(*zip(*ours, strict=True), marker=marker, markersize=4, label=policy)
    panel.axhline(100 * LEAST, color="grey", linestyle="--", linewidth=1)
    panel.set_ylim(0, 102)
    panel.set_xlabel("models")
    panel.set_ylabel("requests kept, %")
    panel.grid(visible=True, alpha=0.3)


def _import_pyplot() -> Any:
    try:
        import_module("matplotlib").use("Agg")  # draws files where there is no screen
        return import_module("matplotlib.pyplot")
    except ModuleNotFoundError:
        raise ConfigError("curves need matplotlib; run: pip install 'aegaeon[bench]'") from None
