"""The seam through which a decoder learns which stages of its weights are in. No torch."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol


class Stages(Protocol):
    """The stages of a packed model, which come in one by one, in order."""

    def await_stage(self, stage: int) -> None:
        """Return when `stage` is in. Raises what kept it from coming."""

    def is_in(self, stage: int) -> bool:
        """Whether `stage` is in, without waiting for it."""

    def cached(self, stage: int) -> AbstractContextManager[Any | None]:
        """Return a context of the node's copy of the packed model, or of None where `stage` is not
        in there either. Entering it raises an AegaeonError when the node has lost the model."""


class AllIn:
    """The stages of a model that is wholly in."""

    def await_stage(self, stage: int) -> None:
        """Wait for nothing."""

    def is_in(self, stage: int) -> bool:  # noqa: ARG002  # as the seam has it
        """Return True."""
        return True

    def cached(self, stage: int) -> AbstractContextManager[Any | None]:  # noqa: ARG002
        """Return a context of None: nobody needs another copy."""
        return nullcontext()
