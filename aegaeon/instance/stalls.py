"""Loads that are put off again and again because nothing comes in: pure, time comes in."""

from aegaeon.errors import LoadLate
from aegaeon.types import Loaded, LoadFailed, ModelId, Outcome, WeightsLost

MAX_FAILED = 2  # remembered: an instance tells of them in its row, which is small
MAX_REASON_CHARS = 160
UNWATCHED_S = 120.0  # where the watchdog is off: clients have a reason all the same


class Stalls:
    """Owned by one runtime. A load that was put off for `limit_s` has failed: its requests are
    told why, long before their time is over. No restart would help: other processes cannot read
    what this one waits for, and its read cannot be ended."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s or UNWATCHED_S
        self._since_s: dict[ModelId, float] = {}
        self._failed: dict[ModelId, str] = {}

    @property
    def failed(self) -> dict[ModelId, str]:
        """The models whose last load has failed, and why; the last MAX_FAILED of them."""
        return dict(self._failed)

    def judge(self, outcome: Outcome, began_s: float, now: float) -> Outcome:
        """Return what a load that began then has come to."""
        outcome = self._judged(outcome, began_s, now)
        if isinstance(outcome, Loaded | LoadFailed):
            self._failed.pop(outcome.model, None)
        if isinstance(outcome, LoadFailed):
            self._failed[outcome.model] = outcome.message[:MAX_REASON_CHARS]
            for model in tuple(self._failed)[:-MAX_FAILED]:
                del self._failed[model]
        return outcome

    def _judged(self, outcome: Outcome, began_s: float, now: float) -> Outcome:
        if not isinstance(outcome, WeightsLost):
            self._since_s.pop(outcome.model, None)
            return outcome
        since_s = self._since_s.setdefault(outcome.model, began_s)
        if now - since_s < self._limit_s:
            return outcome
        del self._since_s[outcome.model]
        message = (
            f"the weights of {outcome.model} are long in coming: nothing has been read for "
            f"{now - since_s:.0f} s; try again later, or look whether the disk answers"
        )
        return LoadFailed(outcome.model, LoadLate.code, message)
