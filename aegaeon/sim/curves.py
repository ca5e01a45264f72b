"""A picture of devices needed against load, drawn by matplotlib, which comes with the extra
`bench`."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from aegaeon.errors import ConfigError

KINDS = (".svg", ".png")
MARKERS = ("o", "s", "^", "d")

# Of each policy, (requests a second, devices or None where the most that may be do not suffice).
Lines = Mapping[str, Sequence[tuple[float, int | None]]]


def write_curves(path: Path, lines: Lines, title: str) -> None:
    """Draw `lines` into `path`. Raises ConfigError where that cannot be."""
    check_picture(path)
    pyplot = _import_pyplot()
    figure, panel = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for (policy, points), marker in zip(lines.items(), MARKERS, strict=False):
        found = sorted((rate, devices) for rate, devices in points if devices is not None)
        if found:
            panel.plot(*zip(*found, strict=True), marker=marker, label=policy)
    panel.set_xlabel("requests per second, all models")
    panel.set_ylabel("devices needed")
    panel.set_ylim(bottom=0)
    panel.set_xlim(left=0)
    panel.grid(visible=True, alpha=0.3)
    panel.set_title(title, fontsize=10)
    if panel.get_lines():
        panel.legend()
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
    finally:
        pyplot.close(figure)


def check_picture(path: Path) -> None:
    """Raise ConfigError where `path` can be no picture, before anything is simulated."""
    if path.suffix not in KINDS:
        raise ConfigError(f"--picture {path} is no {' or '.join(KINDS)} file")
    if not path.parent.is_dir():
        raise ConfigError(f"--picture {path}: there is no folder {path.parent}")
    _import_pyplot()


def _import_pyplot() -> Any:
    try:
        import_module("matplotlib").use("Agg")  # draws files where there is no screen
        return import_module("matplotlib.pyplot")
    except ModuleNotFoundError:
        raise ConfigError("--picture needs matplotlib; run: pip install 'aegaeon[bench]'") from None
