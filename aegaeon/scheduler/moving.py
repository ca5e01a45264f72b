"""How a request goes on at another instance: with its keys and values, or prefilled again there."""

from collections.abc import Sequence

from aegaeon.measures import Speed
from aegaeon.types import Instance

SHARE = 0.25  # of a new measurement, in a decaying mean
LEAST_BYTES = 1 << 16  # fewer say nothing of a link
SETUP_S = 0.002  # for a connection to be made and greeted


class Links:
    """How fast this instance's keys and values go to other nodes, as measured."""

    def __init__(self) -> None:
        self.byte_s: float | None = None  # None: not known

    def note(self, sent_bytes: int, took_s: float) -> None:
        """Learn from so many bytes that went."""
        if sent_bytes >= LEAST_BYTES and took_s > 0.0:
            byte_s = took_s / sent_bytes
            known_s = byte_s if self.byte_s is None else self.byte_s
            self.byte_s = known_s + SHARE * (byte_s - known_s)


def is_worth_moving(kv_bytes: int, tokens: int, byte_s: float | None, speed: Speed | None) -> bool:
    """Whether `kv_bytes` are on another node sooner than `tokens` are prefilled there. What has not
    been measured yet counts as quick to move: it is measured then."""
    if byte_s is None or speed is None or speed.token_s <= 0.0:
        return True
    return SETUP_S + kv_bytes * byte_s < tokens * speed.token_s


def nearest(rows: Sequence[Instance], node: str) -> tuple[tuple[Instance, ...], ...]:
    """Return `rows` by how far they are from `node`: first those that have its memory."""
    near = tuple(row for row in rows if row.record.node == node)
    return near, tuple(row for row in rows if row.record.node != node)
