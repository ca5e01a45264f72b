"""When to try again what came to nothing: one notion for loads, lost weights and KV."""

from dataclasses import dataclass


@dataclass(slots=True)
class Retry:
    """Failures in a row; the wait before the next try doubles from `first_s` to `most_s`.

    The first `free` failures in a row cost no wait.
    """

    first_s: float
    most_s: float
    free: int = 0
    failures: int = 0
    at_s: float = 0.0  # no try before this

    def fail(self, now: float, least_s: float = 0.0) -> None:
        """A try has failed; the next one waits, `least_s` at the least."""
        doublings = self.failures - self.free
        wait_s = (
            0.0 if doublings < 0 else min(self.first_s * 2.0 ** min(doublings, 32), self.most_s)
        )
        self.failures += 1
        self.at_s = now + max(wait_s, least_s)

    def reset(self) -> None:
        """A try went well, or things have changed: the next one need not wait."""
        self.failures = 0
        self.at_s = 0.0
