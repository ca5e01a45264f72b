"""Who ran where and when."""

from typing import Literal, NamedTuple

from aegaeon.types import ModelId

Kind = Literal["prefill", "decode", "switch", "load"]


class Span(NamedTuple):
    """A device did something for a model, from `start_s` to `end_s`."""

    device: int
    kind: Kind
    model: ModelId
    start_s: float
    end_s: float


class Timeline:
    """Collects spans where somebody wants to see them; adjoining ones of a kind become one."""

    def __init__(self, *, is_wanted: bool = False) -> None:
        self._is_wanted = is_wanted
        self._open: dict[tuple[int, bool], Span] = {}
        self._spans: list[Span] = []

    def add(self, device: int, kind: Kind, model: ModelId, start_s: float, end_s: float) -> None:
        """Note a span; those of a device's lane come in order of time."""
        if not self._is_wanted:
            return
        lane = (device, kind == "load")
        last = self._open.get(lane)
        if last is not None:
            if last.kind == kind and last.model == model and last.end_s == start_s:
                start_s = last.start_s
            else:
                self._spans.append(last)
        self._open[lane] = Span(device, kind, model, start_s, end_s)

    def spans(self) -> list[Span]:
        """Return all spans so far, in order of time."""
        return sorted((*self._spans, *self._open.values()), key=lambda span: span.start_s)
