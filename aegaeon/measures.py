"""Records of what was measured: what a request waited for, what moved during switches, and how fast
a model is.

Only data lives here, as in `types`.
"""

from typing import Literal

import msgspec

# From files to the node's cache; then what a switch of a device moves.
Phase = Literal["disk", "kv_out", "weights", "kv_in"]
PHASES: tuple[Phase, ...] = ("disk", "kv_out", "weights", "kv_in")


class PhaseTotal(msgspec.Struct, frozen=True):
    """What one phase came to since the start; `seconds` are those in which its copies ran."""

    count: int = 0
    moved_bytes: int = 0
    seconds: float = 0.0


class Speed(msgspec.Struct, frozen=True, array_like=True):
    """What a model takes at an instance, more or less: each token of a prompt, and its weights."""

    token_s: float
    load_s: float


class Waited(msgspec.Struct, frozen=True, array_like=True):
    """What a request has waited for so far, wherever it was; no second counts twice.

    `queue_s` before its first step, but for `switch_s`: in which its model's weights came or the
    device was given to it, at any time; `switches` times. `preempted_s` since its first step while
    another model had the device, or after it had lost its keys and values. `load_s` is the part of
    `switch_s` in which weights, or keys and values, were brought.
    """

    queue_s: float = 0.0
    switch_s: float = 0.0
    switches: int = 0
    preempted_s: float = 0.0
    load_s: float = 0.0

    def longest(self, other: "Waited") -> "Waited":
        """Return the more of each: what waits side by side came to."""
        return Waited(
            max(self.queue_s, other.queue_s),
            max(self.switch_s, other.switch_s),
            max(self.switches, other.switches),
            max(self.preempted_s, other.preempted_s),
            max(self.load_s, other.load_s),
        )


NOT_WAITED = Waited()
