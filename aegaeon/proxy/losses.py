"""Which of the instances that died were a request's fault: what they did when they died says so.

What to do about it is the gateway's and the request's business.
"""

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from aegaeon.deaths import PROGRESS_TOKENS, WORDS_S, Work, decode_deaths, name_of
from aegaeon.errors import AegaeonError, GivenUp
from aegaeon.proxy.outbox import Target
from aegaeon.store.base import Board
from aegaeon.types import ModelId, RequestId

log = logging.getLogger(__name__)

# In a row, without PROGRESS_TOKENS between: so many instances ended while they computed a request,
# the last of them with nothing else; or, should they never have computed it alone, so many.
MAX_LOSSES, MAX_ALONE, MAX_IN_COMPANY = 4, 2, 6
# From the second one on it is computed alone: whose fault that was shows at the next one.
SUSPECT_LOSSES = 2
# Nobody knows what an instance did whose host or store was silent when it ended: that was hardly
# the request's doing. Those count, too, but for little.
MAX_UNKNOWN = 12
MOST_LOSSES = 24  # whatever progress there was between
# So many that computed or loaded a model in a row, and nobody has got a token of it between; and so
# many loads and different requests at which they did: one bad request, sent again and again, is not
# the model's fault.
MAX_OF_MODEL, OCCASIONS_OF_MODEL = 12, 6


@dataclass(slots=True)
class Suspicion:
    """How much speaks for it that a request ends the instances that compute it."""

    losses: int = 0  # all that may have been its doing
    _known: int = 0  # in a row
    _alone: int = 0  # of these
    _unknown: int = 0  # in a row, likewise
    _made: int = 0  # tokens at the last one

    @property
    def is_suspect(self) -> bool:
        """Whether the request is to be computed alone."""
        return self._known + self._unknown >= SUSPECT_LOSSES

    @property
    def is_certain(self) -> bool:
        """Whether there were too many."""
        return (
            (self._known >= MAX_LOSSES and self._alone >= MAX_ALONE)
            or self._known >= MAX_IN_COMPANY
            or self._known + self._unknown >= MAX_UNKNOWN
            or self.losses >= MOST_LOSSES
        )

    def note(self, request: RequestId, work: Work | None, made: int) -> None:
        """An instance that had `request`, of which `made` tokens have come, ended at `work` (None:
        nobody knows)."""
        if work is not None and not work.is_on(request):
            return  # it only waited there
        if made - self._made >= PROGRESS_TOKENS:
            self._known = self._alone = self._unknown = 0
        self._made = made
        self.losses += 1
        if work is None:
            self._unknown += 1
        else:
            self._known += 1
            self._alone += work.is_on_alone(request)


@dataclass(slots=True)
class _OfModel:
    """Deaths in a row that a model was at work at, while nobody has got a token of it beyond so
    many `tokens`."""

    tokens: int
    deaths: int = 0
    _loads: int = 0  # of these, and of all that computed no request
    _requests: set[RequestId] = field(default_factory=set)  # that were computed at the others

    def note(self, model: ModelId, work: Work) -> None:
        """One more."""
        self.deaths += 1
        if work.loading == model or not work.requests:
            self._loads += 1
        elif len(self._requests) < OCCASIONS_OF_MODEL:
            self._requests.update(work.requests[:OCCASIONS_OF_MODEL])

    @property
    def is_bad(self) -> bool:
        """Whether there were too many for it to be the fault of a request."""
        occasions = self._loads + len(self._requests)
        return self.deaths >= MAX_OF_MODEL and occasions >= OCCASIONS_OF_MODEL


class Lost(NamedTuple):
    """A life that has ended, and what it did (None: nobody knows); models that are bad as a whole,
    whose requests are not to be tried again."""

    target: Target
    work: Work | None
    bad: Mapping[ModelId, AegaeonError]


class Losses:
    """What instances did when they died, as their supervisors tell on the board. `fence` keeps a
    life from coming back. One thread calls the verbs, and they may block."""

    def __init__(self, board: Board, fence: Callable[[Target], None]) -> None:
        self._board = board
        self._fence = fence
        self._gone_s: dict[Target, float] = {}  # since when, of those whose last words are awaited
        self._of_models: dict[ModelId, _OfModel] = {}

    def judge(self, gone: Collection[Target], made: Mapping[ModelId, int]) -> list[Lost]:
        """Return those of `gone`, lives that have ended with requests, of which it is known what
        they did; a moment later also the others. Those can come back no more: one that is only cut
        off finds itself replaced. `made` are the tokens of each model so far. Raises
        StoreUnavailable, with nothing judged."""
        now = time.monotonic()
        self._gone_s = {target: self._gone_s.get(target, now) for target in gone}
        records = self._board.read()
        ended: list[tuple[Target, Work | None]] = []
        for target, since_s in self._gone_s.items():
            record = records.get(name_of(target.instance), b"")
            is_known, work = _found(record, target)
            if is_known or now - since_s >= WORDS_S:
                ended.append((target, work))
                self._fence(target)
        for target, work in ended:
            log.warning("instance lost instance=%s work=%s", target.instance, work)
        return [Lost(target, work, self._bad(work, made)) for target, work in ended]

    def close(self) -> None:
        """Let go of the board."""
        self._board.close()

    def _bad(self, work: Work | None, made: Mapping[ModelId, int]) -> dict[ModelId, AegaeonError]:
        """Count a death against the models that were at work; return those that had too many."""
        bad: dict[ModelId, AegaeonError] = {}
        if work is None:
            return bad
        for model in {one for one in (work.model, work.loading) if one is not None}:
            deaths = self._of_models.get(model)
            if deaths is None or deaths.tokens != made.get(model, 0):
                deaths = self._of_models[model] = _OfModel(made.get(model, 0))
            deaths.note(model, work)
            if deaths.is_bad:
                bad[model] = GivenUp(
                    f"{deaths.deaths} instances in a row ended while they loaded or computed "
                    f"{model!r}, and nobody got a token of it: its weights may be damaged, or too "
                    "large for this machine; see the server's log, and remove the model"
                )
        return bad


def _found(record: bytes, target: Target) -> tuple[bool, Work | None]:
    """Return whether `record` tells of the end of `target`, and of what it did."""
    if record:
        try:
            for death in decode_deaths(record):
                if death.incarnation == target.incarnation:
                    return True, death.work
        except AegaeonError as error:
            log.warning("deaths not readable instance=%s error=%s", target.instance, error)
    return False, None
