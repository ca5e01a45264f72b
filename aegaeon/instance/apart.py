"""An action done in parts: requests that may have ended an instance are computed alone, behind all
others, so that the next death says which of them it was. Pure; the runtime does the parts.
"""

from collections import OrderedDict, deque
from collections.abc import Collection
from itertools import takewhile

import msgspec

from aegaeon.deaths import PROGRESS_TOKENS
from aegaeon.types import (
    ComputeAction,
    Decode,
    Outcome,
    Prefill,
    Request,
    RequestId,
    Stepped,
    WeightsLost,
)

MAX_SUSPECTS = 4096  # remembered; the first of more are trusted again


class Suspects:
    """The requests that came as such and have not got far enough since. Owned by one runtime."""

    def __init__(self) -> None:
        self._left: OrderedDict[RequestId, int] = OrderedDict()  # tokens until they are trusted

    def enter(self, request: Request) -> None:
        """An attempt came."""
        self._left.pop(request.id, None)
        if request.is_suspect:
            self._left[request.id] = PROGRESS_TOKENS
            if len(self._left) > MAX_SUSPECTS:
                self._left.popitem(last=False)

    def among(self, action: ComputeAction) -> tuple[RequestId, ...]:
        """Return those of an action, in its order."""
        if not self._left or not isinstance(action, Prefill | Decode):
            return ()
        return tuple(request for request in action.requests if request in self._left)

    def gained(self, outcome: Stepped) -> None:
        """A step has made tokens."""
        if not self._left:
            return
        for token in outcome.tokens:
            left = self._left.pop(token.request_id, 1) - 1
            if left > 0 and token.finish_reason is None:
                self._left[token.request_id] = left


class Apart:
    """The parts of one action, one after the other. Tokens do not depend on who is computed with
    whom, so the outcome is that of the whole action, but for what it took."""

    def __init__(self, action: ComputeAction, suspects: Collection[RequestId] = ()) -> None:
        """`suspects` are of its requests. Without any there is one part, the action itself."""
        self.action = action
        self._first: ComputeAction | None = action
        self._alone: deque[RequestId] = deque()
        self._done: list[Stepped] = []
        if isinstance(action, Prefill | Decode) and suspects and len(action.requests) > 1:
            alone, others = _split(action, suspects)
            self._alone.extend(alone)
            self._first = msgspec.structs.replace(action, requests=others) if others else None

    @property
    def is_next_alone(self) -> bool:
        """Whether the next part is a suspect's."""
        return self._first is None

    def next(self) -> ComputeAction:
        """Return the next part; there is one until `end` says otherwise."""
        first, self._first = self._first, None
        if first is not None:
            return first
        return msgspec.structs.replace(self.action, requests=(self._alone.popleft(),))

    def end(self, outcome: Outcome) -> Outcome | None:
        """A part has ended; return the outcome of the whole where nothing is left to do."""
        if isinstance(outcome, Stepped):
            self._done.append(outcome)
            # Who lost its KV must be prefilled again, which is decided anew.
            self._alone = deque(one for one in self._alone if one not in outcome.preempted)
            if self._alone:
                return None
        elif not self._done or not isinstance(outcome, WeightsLost):
            return outcome  # of all its requests
        return self._done[0] if len(self._done) == 1 else _whole(self._done)


def _split(
    action: Prefill | Decode, suspects: Collection[RequestId]
) -> tuple[Collection[RequestId], tuple[RequestId, ...]]:
    """Return those computed alone, and all others. Of a prefill with a bound only the first part,
    in its order: it may take all that is allowed, and who is left comes with another action."""
    requests = action.requests
    if not isinstance(action, Prefill) or action.max_tokens is None:
        return suspects, tuple(one for one in requests if one not in suspects)
    others = tuple(takewhile(lambda one: one not in suspects, requests))
    return (() if others else requests[:1]), others


def _whole(parts: list[Stepped]) -> Stepped:
    """Return what came of all of them: what a part tells of some requests, one behind the other."""
    first = parts[0]
    lists = [name for name in first.__struct_fields__ if isinstance(getattr(first, name), tuple)]
    told = {name: tuple(one for part in parts for one in getattr(part, name)) for name in lists}
    told["preempted"] = tuple(dict.fromkeys(told["preempted"]))
    return msgspec.structs.replace(
        first,
        **told,
        took_s=sum(part.took_s for part in parts),
        shortage=next((part.shortage for part in parts if part.shortage), ""),
        is_apart=True,
    )
