"""A picture of who ran where and when: one HTML file that needs nothing else, drawn by Bokeh.

Imported only where somebody wants one: Bokeh comes with the extra `sim`.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from bokeh.embed import file_html
from bokeh.models import ColumnDataSource, HoverTool, Range1d
from bokeh.palettes import Category20
from bokeh.plotting import figure
from bokeh.resources import INLINE

from aegaeon.errors import ConfigError
from aegaeon.sim.timeline import Span
from aegaeon.types import ModelId

WIDTH, ROW_HEIGHT, FRAME_HEIGHT = 1400, 34, 140  # pixels
COLOURS = Category20[20]
SWITCH_COLOUR = "#000000"
# Of a device's row: where the lane lies, how high it is, and how strong its colour.
LANES = {
    "decode": (0.15, 0.55, 0.9),
    "prefill": (0.15, 0.7, 0.9),
    "switch": (0.15, 0.7, 0.9),
    "load": (-0.32, 0.2, 0.6),
}


def write_picture(path: Path, spans: Sequence[Span], title: str) -> None:
    """Write the picture of `spans` to `path`. Raises ConfigError when that cannot be written."""
    try:
        path.write_text(draw(spans, title), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def draw(spans: Sequence[Span], title: str) -> str:
    """Return the picture as HTML: a row for each device, computing above, loading below."""
    devices = 1 + max((span.device for span in spans), default=0)
    plot = figure(
        title=title,
        width=WIDTH,
        height=FRAME_HEIGHT + ROW_HEIGHT * devices,
        sizing_mode="stretch_width",
        x_axis_label="seconds",
        y_axis_label="device",
        y_range=Range1d(start=devices - 0.4, end=-0.6),
        tools="xpan,xwheel_zoom,xbox_zoom,reset",
        active_drag="xpan",
        active_scroll="xwheel_zoom",
    )
    plot.yaxis.ticker = list(range(devices))
    plot.ygrid.visible = False
    colours = _colours(span.model for span in spans)
    for kind in LANES:
        rows = [span for span in spans if span.kind == kind]
        _draw_lane(plot, kind, rows, colours)
    plot.legend.click_policy = "hide"
    plot.legend.orientation = "horizontal"
    plot.add_layout(plot.legend[0], "above")
    plot.add_tools(
        HoverTool(
            tooltips=[
                ("", "@kind of @model"),
                ("from", "@start{0.000} s, for @took{0.0} ms, on device @device"),
            ]
        )
    )
    return str(file_html(plot, INLINE, title))


def _draw_lane(plot: figure, kind: str, spans: Sequence[Span], colours: dict[ModelId, str]) -> None:
    offset, height, alpha = LANES[kind]
    source = ColumnDataSource(
        {
            "kind": [kind] * len(spans),
            "model": [span.model for span in spans],
            "device": [span.device for span in spans],
            "y": [span.device - offset for span in spans],
            "start": [round(span.start_s, 6) for span in spans],
            "end": [round(span.end_s, 6) for span in spans],
            "took": [round(1000 * (span.end_s - span.start_s), 3) for span in spans],
            "colour": [SWITCH_COLOUR if kind == "switch" else colours[s.model] for s in spans],
        }
    )
    plot.hbar(
        y="y",
        left="start",
        right="end",
        height=height,
        color="colour",
        alpha=alpha,
        line_width=0.5 if kind == "prefill" else 0,
        line_color="black" if kind == "prefill" else None,
        legend_label=kind,
        source=source,
    )


def _colours(models: Iterable[ModelId]) -> dict[ModelId, str]:
    """A colour for each model; there are more models than colours."""
    names = sorted(set(models))
    return {model: COLOURS[index % len(COLOURS)] for index, model in enumerate(names)}
