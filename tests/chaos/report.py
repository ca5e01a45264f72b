"""What a run came to, for people and for programs."""

import sys
from collections.abc import Sequence

import msgspec

from tests.chaos.leaks import MOST_GROWTH
from tests.chaos.streams import FORBIDDEN, Tally


class Outcome(msgspec.Struct, frozen=True):
    """A run. `left` is what was still held at the end; `growth` that of private memory."""

    store: str
    seconds: float
    faults: dict[str, int]
    streams: dict[str, int]
    examples: list[str]
    growth: float
    left: list[str]

    @property
    def is_good(self) -> bool:
        """Whether nothing happened that must not."""
        bad = sum(self.streams.get(end.name, 0) for end in FORBIDDEN)
        has_any = self.streams.get("SAME", 0) > 0 and sum(self.faults.values()) > 0
        return has_any and not bad and not self.left and self.growth <= MOST_GROWTH


def streams_of(tally: Tally) -> dict[str, int]:
    """Return the counts by name."""
    return {end.name: count for end, count in tally.ends.items()}


def tell(outcome: Outcome) -> None:
    """Print it for people."""
    lines = [
        f"{outcome.store}, {outcome.seconds:.0f} s: {'good' if outcome.is_good else 'NOT GOOD'}",
        f"  faults:  {_counts(outcome.faults)}",
        f"  streams: {_counts(outcome.streams)}",
        f"  private memory at the end over that of before: {outcome.growth:.2f}",
    ]
    lines += [f"  left: {one}" for one in outcome.left]
    lines += [f"  {one}" for one in outcome.examples]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def to_json(outcomes: Sequence[Outcome]) -> str:
    """Return all of it as JSON."""
    return msgspec.json.format(msgspec.json.encode(outcomes), indent=2).decode()


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"
