"""How many bytes moved, and how long that took, by phase of a switch."""

import threading

from aegaeon._native import CopyTicket
from aegaeon.measures import PHASES, Phase, PhaseTotal

LEAST_OPEN = 64


class Traffic:
    """Counts copies when they have ended. Any thread may call its verbs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals: dict[Phase, PhaseTotal] = {phase: PhaseTotal() for phase in PHASES}
        self._open: list[tuple[Phase, CopyTicket]] = []
        self._settle_at = LEAST_OPEN  # so that no more are kept than are under way, about

    def watch(self, phase: Phase, ticket: CopyTicket) -> None:
        """Count `ticket` once it has ended."""
        with self._lock:
            self._open.append((phase, ticket))
            if len(self._open) >= self._settle_at:
                self._settle()
                self._settle_at = 2 * len(self._open) + LEAST_OPEN

    def add(self, phase: Phase, moved_bytes: int, seconds: float) -> None:
        """Count what no ticket stands for."""
        with self._lock:
            self._add(phase, moved_bytes, seconds)

    def totals(self) -> dict[Phase, PhaseTotal]:
        """Return the totals of what has ended."""
        with self._lock:
            self._settle()
            return dict(self._totals)

    def _settle(self) -> None:
        running = []
        for phase, ticket in self._open:
            if ticket.is_done or ticket.is_cancelled or ticket.has_failed:
                self._add(phase, ticket.progress_bytes, ticket.seconds)
            else:
                running.append((phase, ticket))
        self._open = running

    def _add(self, phase: Phase, moved_bytes: int, seconds: float) -> None:
        old = self._totals[phase]
        self._totals[phase] = PhaseTotal(
            old.count + 1, old.moved_bytes + moved_bytes, old.seconds + seconds
        )
