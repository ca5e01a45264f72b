"""What a step makes: tokens, scores, and sequences that end for what they have computed."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from aegaeon.engine.sequence import Sequence
from aegaeon.errors import AegaeonError
from aegaeon.sampling import PromptScores
from aegaeon.types import Begun, Failure, NewToken, RequestId


@dataclass(slots=True)
class Made:
    """What the passes of a step have made so far. Who is `lost` keeps its blocks to the end: later
    passes write to them."""

    tokens: list[NewToken] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    scores: list[PromptScores] = field(default_factory=list)
    lost: dict[RequestId, bool] = field(default_factory=dict)  # and whether its KV is poisoned

    def fail(self, sequence: Sequence, error: AegaeonError | None = None) -> None:
        """The sequence ends in `error`, or because what it has computed is not finite."""
        request = sequence.request
        if request.id in self.lost:
            return
        self.lost[request.id] = error is None
        message = f"{request.model} made logits that are not finite; the request ends"
        code = AegaeonError.code if error is None else error.code
        self.failed.append((request.id, code, message if error is None else str(error)))

    def begun(self, starts: Iterable[tuple[Sequence, int]]) -> tuple[Begun, ...]:
        """Return those that go on, of sequences and where they started, and have no token."""
        ended = {token.request_id for token in self.tokens} | self.lost.keys()
        return tuple(
            Begun(sequence.request.id, sequence.cached, start)
            for sequence, start in starts
            if sequence.request.id not in ended
        )
