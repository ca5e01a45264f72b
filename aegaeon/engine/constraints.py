"""What the sequences of an engine may have next, asked of the process that works it out.

Asked as soon as a token is made and needed a step later: nobody waits for an answer but its own
sequence. Where the process ends, its sequences begin again from their tokens in the next one.
"""

import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait

import torch
from torch import Tensor

from aegaeon.engine.grammar_client import GrammarHost, HostLost
from aegaeon.engine.grammar_host import Begin, Push, Question
from aegaeon.errors import Overloaded
from aegaeon.types import ModelSpec, Request

SLOW_S = 0.01  # an answer that is not there after this is not waited for
MAX_LOSSES = 3  # without an answer between, and with nobody else to blame


class Constraint:
    """What one sequence may have next. `made` are its generated tokens, which its owner adds to."""

    def __init__(
        self, host: GrammarHost, spec: ModelSpec, request: Request, made: list[int]
    ) -> None:
        self.key = host.new_key()
        self._host = host
        self._spec = spec
        self._request = request
        self._made = made
        self._losses = 0
        self._asked_s = 0.0
        self._ask_from_the_beginning()

    def push(self, token_id: int) -> None:
        """Take the token that was drawn, which `made` has."""
        if self._host.life != self._life:
            self._ask_from_the_beginning()
            return
        self._ask(Push(self.key, token_id))

    @property
    def is_ready(self) -> bool:
        """Whether it is known what may come, or that nothing may."""
        if not self.answer.done():
            return False
        lost = self.answer.exception()
        if not isinstance(lost, HostLost):
            self._losses = 0
            return True
        self._losses += lost.is_charged
        if self._losses >= MAX_LOSSES:
            return True
        self._ask_from_the_beginning()
        return False

    @property
    def is_slow(self) -> bool:
        """Whether the answer takes longer than a step is to wait."""
        return not self.is_ready and time.monotonic() - self._asked_s > SLOW_S

    def allowed(self) -> Tensor:
        """Return the mask, int32 words. Raises where the sequence cannot go on: InvalidRequest,
        Overloaded, or AegaeonError itself for a mistake of ours."""
        assert self.answer.done()
        try:
            mask = self.answer.result()
        except HostLost:
            text = "what follows schemas was lost again and again; try again later"
            raise Overloaded(text) from None
        return torch.frombuffer(mask, dtype=torch.int32)

    def close(self) -> None:
        """Forget the sequence."""
        self._host.end(self.key)

    def _ask_from_the_beginning(self) -> None:
        self._life = self._host.life
        spec, request = self._spec, self._request
        stops, grammar = request.stop_token_ids, request.sampling.grammar
        begin = Begin(self.key, spec.path, spec.vocab_tokens, stops, grammar, tuple(self._made))
        self._ask(begin)

    def _ask(self, question: Question) -> None:
        self._asked_s = time.monotonic()
        self.answer: Future[bytearray] = self._host.ask(self.key, question, self._life)


def await_any(constraints: Sequence[Constraint], timeout_s: float) -> None:
    """Return when one of them is ready, or the time is over."""
    wait([one.answer for one in constraints], timeout_s, FIRST_COMPLETED)
