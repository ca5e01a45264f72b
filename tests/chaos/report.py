"""What a run came to, for people and for programs."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec

from tests.chaos.leaks import MOST_GROWTH
from tests.chaos.plan import Done
from tests.chaos.streams import FORBIDDEN, Tally


class Outcome(msgspec.Struct, frozen=True):
    """A run. `left` is what was still held at the end; `growth` that of private memory."""

    store: str
    seed: int
    seconds: float
    faults: list[Done]
    streams: dict[str, int]
    examples: list[str]
    growth: float
    left: list[str]

    @property
    def is_good(self) -> bool:
        """Whether nothing happened that must not."""
        bad = sum(self.streams.get(end.name, 0) for end in FORBIDDEN)
        has_any = self.streams.get("SAME", 0) > 0 and len(self.faults) > 0
        return has_any and not bad and not self.left and self.growth <= MOST_GROWTH


def streams_of(tally: Tally) -> dict[str, int]:
    """Return the counts by name."""
    return {end.name: count for end, count in tally.ends.items()}


def tell(outcome: Outcome, with_times: bool) -> None:
    """Print it for people; with times, what was done when."""
    lines = [
        f"{outcome.store}, seed {outcome.seed}, {outcome.seconds:.0f} s: "
        f"{'good' if outcome.is_good else 'NOT GOOD'}",
        f"  faults:  {_counts(Counter(done.what for done in outcome.faults))}",
        f"  streams: {_counts(outcome.streams)}",
        f"  private memory at the end over that of before: {outcome.growth:.2f}",
    ]
    lines += [f"  left: {one}" for one in outcome.left]
    lines += [f"  {one}" for one in outcome.examples]
    if with_times:
        lines += [
            f"  {done.at_s:7.2f} s, for {done.took_s:5.2f} s: {done.what} ({done.whom})"
            for done in outcome.faults
        ]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def to_json(outcomes: Sequence[Outcome]) -> str:
    """Return all of it as JSON."""
    return msgspec.json.format(msgspec.json.encode(outcomes), indent=2).decode()


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"
