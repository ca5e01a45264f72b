"""Who hears what actions really took, to refine what the policies think they take."""

from collections.abc import Sequence
from typing import Protocol

from aegaeon.types import ModelId


class Observer(Protocol):
    """Told of actions that ended as they were meant to; times that are 0 say nothing."""

    def prefilled(
        self, model: ModelId, lengths: Sequence[int], cached: Sequence[int], took_s: float
    ) -> None:
        """Prompts of `lengths` tokens were prefilled together, each behind its first `cached`
        ones."""

    def decoded(self, model: ModelId, contexts: Sequence[int], took_s: float) -> None:
        """Sequences of `contexts` tokens got one more each."""

    def loaded(self, model: ModelId, took_s: float) -> None:
        """The weights came."""
