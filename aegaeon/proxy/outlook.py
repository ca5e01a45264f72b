"""When those who are refused at the door should come again: predicted from what is open here, what
instances say, and the costs of their actions.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import msgspec

from aegaeon.config import Settings
from aegaeon.errors import ConfigError
from aegaeon.measures import Phase
from aegaeon.proxy.generation import Generation, OpenRequest
from aegaeon.scheduler.cost import Costs, decode_costs
from aegaeon.scheduler.dispatch import PREFILLING
from aegaeon.scheduler.forecast import Ahead, Event, Forecast, Line, Pace, Site, forecast
from aegaeon.scheduler.known_costs import known_costs
from aegaeon.specs import Bounds
from aegaeon.types import Instance, InstanceId, ModelId, ModelSpec

log = logging.getLogger(__name__)

FRESH_S = 0.5  # a forecast is good for so long
LOOK_AHEAD = 64  # requests of an instance whose beginning is looked at
LEAST_PACE, MOST_PACE = 0.02, 50.0
FADE = 0.9  # what the mean of answers keeps of itself with each that ends

OTHERS = "\n"  # the key of other proxies' requests; none is called so

Room = Literal["waiting", "loading", "open", "bytes"]


class Outlook:
    """Owned by the gateway. `opened` and `rows` say what is open here and which instances live."""

    def __init__(
        self,
        settings: Settings,
        opened: Callable[[], Iterable[OpenRequest]],
        rows: Callable[[], tuple[Instance, ...]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._opened = opened
        self._rows = rows
        self._clock = clock
        self._known = _read_costs(settings.costs_file)
        self._costs: Costs | None = None
        # Of the tokens that were asked for, the part that was made, on the average.
        self._made: dict[ModelId, float] = {}
        self._forecast = Forecast((), ())
        self._made_s = float("-inf")
        self._lines: defaultdict[tuple[Room, str], Line] = defaultdict(Line)

    def serve(self, specs: Iterable[ModelSpec]) -> None:
        """These are served from here on."""
        served = tuple(specs)
        self._costs = known_costs(self._known, self._settings, served, 1 << 30).costs
        self._made = {spec.id: self._made[spec.id] for spec in served if spec.id in self._made}

    def bound(self, bounds: Bounds) -> None:
        """Go by other bounds from here on."""
        changes = msgspec.structs.asdict(bounds)
        self._settings = msgspec.structs.replace(self._settings, **changes)

    def note_end(self, generation: Generation, tokens: int) -> None:
        """An answer has ended after so many tokens."""
        made = min(tokens / generation.max_tokens, 1.0)
        mean = self._made.get(generation.model, made)
        self._made[generation.model] = FADE * mean + (1.0 - FADE) * made

    def was_told(self, key: str) -> bool:
        """Whether one of `key`, or of any, was told to come and wait from now on; once."""
        now = self._clock()
        lines = (self._lines.get(("waiting", name)) for name in dict.fromkeys((key, "")))
        return any(line is not None and line.redeem(now) for line in lines)

    def resident(self) -> frozenset[ModelId]:
        """Return the models whose weights are on some device, as instances last said."""
        return frozenset(model for row in self._rows() for model in row.status.resident)

    def kept(self) -> int:
        """Return how many places to wait are kept for those who were told to come."""
        line = self._lines.get(("waiting", ""))
        return 0 if line is None else line.kept(self._clock())

    def wait_s(self, room: Room, key: str | None, free: int = 0) -> float:
        """Return when one who is refused now should come again: when a place comes free for which
        nobody was told to come earlier, beyond the `free` ones; of `key`, where only its own are
        taken (None: any)."""
        now = self._clock()
        if now - self._made_s >= FRESH_S:
            self._forecast, self._made_s = self._look(now), now
        free_s = [
            self._made_s + one.after_s
            for one in self._events(room)
            if (one.key != OTHERS if key is None else one.key == key)
        ]
        return self._lines[room, key or ""].promise(free_s, free, now)

    def _events(self, room: Room) -> Iterable[Event]:
        """Return what makes such room."""
        if room == "waiting":
            return self._forecast.begins
        if room == "loading":
            resident = self.resident()
            return (one for one in self._forecast.begins if one.model not in resident)
        return self._forecast.ends

    def _look(self, now: float) -> Forecast:
        rows = [row for row in self._rows() if row.status.state == "ready"]
        costs = self._costs
        for name in [name for name, line in self._lines.items() if line.is_over(now)]:
            del self._lines[name]
        if costs is None or not costs.models or not rows:
            return Forecast((), ())
        settings = self._settings
        link = _link_gb_per_s(rows)
        if link is not None:
            costs = msgspec.structs.replace(costs, link_gb_per_s=link)
        pace = Pace(costs, settings.max_batch, settings.running, settings.slo_tbt_s)
        return forecast(self._sites(rows), pace, LOOK_AHEAD)

    def _sites(self, rows: list[Instance]) -> list[Site]:
        asked: defaultdict[InstanceId | None, list[Ahead]] = defaultdict(list)
        for one in self._opened():
            target = None if one.target is None else one.target.instance
            asked[target].append(self._ahead(one))
        able = [row.record.id for row in rows if row.record.role in PREFILLING]
        if able:
            # Those that are on their way go where there is least.
            least = min(able, key=lambda name: len(asked[name]))
            asked[least] += asked[None]
        return [
            Site(
                _with_others(asked[row.record.id], row),
                frozenset(row.status.resident),
                _pace(row),
            )
            for row in rows
        ]

    def _ahead(self, one: OpenRequest) -> Ahead:
        generation = one.generation
        left = (generation.max_tokens - one.made) * self._made.get(generation.model, 1.0)
        return Ahead(
            generation.key,
            generation.model,
            len(generation.prompt_token_ids),
            max(1.0, left),
            one.has_tokens,
        )


def _with_others(ours: list[Ahead], row: Instance) -> list[Ahead]:
    """Return `ours` among those that other proxies have there, which are taken to be alike."""
    there = sum(row.status.waiting.values()) + sum(row.status.running.values())
    if not ours or there <= len(ours):
        return ours
    found: list[Ahead] = []
    for number, one in enumerate(ours, 1):
        found.append(one)
        missing = number * there // len(ours) - len(found)
        found += [one._replace(key=OTHERS)] * missing
    return found


def _pace(row: Instance) -> float:
    """What steps take there, over what they would by the costs."""
    status = row.status
    if status.expected_s <= 0.0 or status.compute_s <= 0.0:
        return 1.0
    return min(max(status.compute_s / status.expected_s, LEAST_PACE), MOST_PACE)


def _link_gb_per_s(rows: Iterable[Instance]) -> float | None:
    """At what rate weights came, so far, on their slowest way; None: none came."""
    rates = []
    phases: tuple[Phase, ...] = ("disk", "weights")
    for phase in phases:
        totals = [row.status.moved[phase] for row in rows if phase in row.status.moved]
        seconds = sum(total.seconds for total in totals)
        if seconds > 0.0:
            rates.append(sum(total.moved_bytes for total in totals) / seconds / 1e9)
    return min((rate for rate in rates if rate > 0.0), default=None)


def _read_costs(costs_file: str) -> Costs | None:
    """Return what the file knows. One that cannot be read is the instances' to complain of."""
    if not costs_file:
        return None
    try:
        path = Path(costs_file).expanduser()
        return decode_costs(path.read_bytes(), str(path))
    except (OSError, ConfigError) as error:
        log.warning("costs are guessed error=%s", error)
        return None
