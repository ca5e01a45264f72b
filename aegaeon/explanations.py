"""Records that say why: decisions of schedulers, choices of dispatchers, and how one asks for them.

Only data lives here, as in `types`.
"""

import msgspec

from aegaeon.types import InstanceId, ModelId, RequestId


class Decision(msgspec.Struct, frozen=True):
    """A decision and its reason's code. `times` are how often it was taken in a row, first at
    `at_s` and last at `until_s`, seconds of the scheduler's clock."""

    at_s: float
    until_s: float
    action: str
    model: ModelId | None
    requests: tuple[RequestId, ...]
    evicted: tuple[ModelId, ...]
    reason: str
    times: int


class Explain(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """To an instance: tell `reply_to` what was decided lately, the last `limit` decisions at most.

    Of `request` those that concern it, and what befell the weights of `model`; of none all. Times
    are to be by the asker's clock, of which the wall's is `ahead_s` ahead (None: it is ours).
    """

    ticket: int
    reply_to: str
    request: RequestId | None
    model: ModelId | None
    limit: int
    ahead_s: float | None = None


class Explained(msgspec.Struct, frozen=True, tag=True):
    """Answer to an Explain, the newest decision last."""

    ticket: int
    instance: InstanceId
    decisions: tuple[Decision, ...]


class Dispatched(msgspec.Struct, frozen=True, kw_only=True):
    """A proxy sent an attempt of `request` to `instance`; `excluded` could not be chosen. `key` is
    the name of the key it was asked with."""

    at_s: float
    arrival_s: float
    request: RequestId
    attempt: int
    model: ModelId
    instance: InstanceId
    reason: str
    excluded: tuple[InstanceId, ...]
    key: str = ""


class At(msgspec.Struct, frozen=True):
    """A decision and where it was taken."""

    instance: InstanceId
    decision: Decision


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered, the newest last; `silent` instances did not answer in time. Times are
    those of the node's monotonic clock, `now_s` when this was written."""

    now_s: float
    dispatched: tuple[Dispatched, ...]
    decisions: tuple[At, ...]
    silent: tuple[InstanceId, ...]


def is_of(request: RequestId, asked: RequestId) -> bool:
    """Whether `request` is the one asked for: itself, or a choice of the answer with that id."""
    return request == asked or request.startswith(f"{asked}.")
